"""A callback that lets open_clip's main() train over several processes on the CPU.

It always names a device for DistributedDataParallel, which a model on the CPU must not have.
"""

from __future__ import annotations

import functools

import torch

from fairclip_losses.integrations.events import Callback


class AllowCpu(Callback):
    def on_args_parsed(self, state):
        wrap = torch.nn.parallel.DistributedDataParallel

        @functools.wraps(wrap)
        def without_devices(model, device_ids=None, **options):
            return wrap(model, **options)

        torch.nn.parallel.DistributedDataParallel = without_devices
