"""A training program of the shape of open_clip 4's, small enough to read."""

from __future__ import annotations

import argparse
import types
from dataclasses import dataclass
from typing import Any

import torch
from open_clip import ClipLoss
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fairclip_losses.integrations.open_clip import HOST

COUNT, BATCH, SIZE = 24, 4, 6


class Pairs(Dataset):
    """Feature pairs as dicts; ``text_valid`` is one of the entries that only some batches have."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.image, self.text = torch.randn(2, COUNT, SIZE, generator=draw)

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return {"image": self.image[index], "text": self.text[index], "text_valid": index}


class Towers(nn.Module):
    """Takes a batch by name, and nothing that it does not know."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(SIZE, 4), nn.Linear(SIZE, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, image, text, text_valid=None):
        normalize = nn.functional.normalize
        return {
            "image_features": normalize(self.image(image), dim=-1),
            "text_features": normalize(self.text(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


class Task(nn.Module):
    """Model and loss in one."""

    data_keys = ("image", "text")

    def __init__(self, model, loss):
        super().__init__()
        self.trainable_module = model
        if loss is not None:
            self.loss = loss

    def prepare_batch(self, batch):
        return {key: value.float() if key == "image" else value for key, value in batch.items()}

    def forward(self, batch):
        out = self.trainable_module(**batch)
        if not self.training:
            return out
        losses = self.loss(**out, output_dict=True)
        losses["loss"] = sum(value for key, value in losses.items() if key.endswith("_loss"))
        return losses, {"logit_scale": out["logit_scale"]}

    def compute_accum_loss(self, inputs, inputs_no_accum, batches):
        return self.loss(**inputs, **inputs_no_accum, output_dict=True), {}


@dataclass
class LoopState:
    task: Any
    optimizer: Any
    scaler: Any = None
    epoch: int = 0


def make_task_host(loss=ClipLoss, start_epoch=0):
    """A module with the hook points of open_clip 4 and a main() that calls them in its order."""
    host = types.ModuleType(HOST)

    def parse_args(args):
        parser = argparse.ArgumentParser()
        for flag, default in (("epochs", 2), ("accum-freq", 1), ("batch-size", BATCH),
                              ("log-every-n-steps", 1), ("save-frequency", 0)):  # fmt: skip
            parser.add_argument(f"--{flag}", type=int, default=default)
        for flag in ("train-data", "val-data", "resume"):
            parser.add_argument(f"--{flag}")
        parsed = parser.parse_args(args)
        constants = {
            "dataset_type": "csv", "csv_separator": "\t", "csv_img_key": "filepath",
            "csv_caption_key": "title", "device": "cpu", "rank": 0, "world_size": 1,
            "model": "towers", "save_logs": False, "save_most_recent": False, "logs": "none",
        }  # fmt: skip
        vars(parsed).update(constants)
        return parsed

    def create_task(args, model, dist_model=None, naflex_data_config=None):
        return Task(model, None if loss is None else loss())

    def get_data(args, preprocess_fns, epoch=0, tokenizer=None, naflex_data_config=None):
        draw = torch.Generator().manual_seed(1)
        loader = DataLoader(Pairs(), BATCH, shuffle=True, drop_last=True, generator=draw)
        loader.num_batches, loader.num_samples = len(loader), COUNT
        return {"train": types.SimpleNamespace(dataloader=loader), "val": None}

    def train_one_epoch(state, data, args, tb_writer=None):
        state.task.train()
        held, features = [], {}
        for batch in data["train"].dataloader:
            host.batches.append(set(batch))
            batch = state.task.prepare_batch(batch)
            state.optimizer.zero_grad()
            if args.accum_freq == 1:
                if not hasattr(state.task, "loss"):
                    continue
                losses, _ = state.task(batch)
                losses["loss"].backward()
                state.optimizer.step()
                host.losses.append(losses)
                continue
            with torch.no_grad():
                out = state.task.trainable_module(**batch)
                out.pop("logit_scale")
            held.append(batch)
            for key, value in out.items():
                features.setdefault(key, []).append(value)
            if len(held) < args.accum_freq:
                continue
            for j, again in enumerate(held):
                out = state.task.trainable_module(**again)
                scale = {"logit_scale": out.pop("logit_scale")}
                inputs = {
                    key: torch.cat([*values[:j], out[key], *values[j + 1 :]])
                    for key, values in features.items()
                }
                losses, _ = state.task.compute_accum_loss(inputs, scale, held)
                sum(value for key, value in losses.items() if key.endswith("_loss")).backward()
                host.losses.append(losses)
            state.optimizer.step()
            held, features = [], {}

    def evaluate(task, data, epoch, args, tb_writer=None, tokenizer=None):
        task.eval()
        return {"epoch": epoch}

    def main(args):
        args = host.parse_args(args)
        model = Towers()
        task = host.create_task(args, model=model, dist_model=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = host.get_data(args, (None, None), epoch=start_epoch, tokenizer=None)
        state = LoopState(task, optimizer, epoch=start_epoch)
        host.args, host.task = args, task
        for epoch in range(start_epoch, args.epochs):
            state.epoch = epoch
            host.train_one_epoch(state, data, args, tb_writer=None)
            host.evaluate(task, data, epoch + 1, args, tb_writer=None, tokenizer=None)

    for function in (parse_args, create_task, get_data, train_one_epoch, evaluate, main):
        setattr(host, function.__name__, function)
    host.batches, host.losses = [], []
    return host
