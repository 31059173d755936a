"""FairLoss in a training loop of your own: toy features, planted bad pairs, one unfair group.

Run: python examples/plain_loop.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fairclip_losses import BadPairMiner, FairLoss, SinkhornFairnessLoss

PAIRS, EPOCHS = 512, 15
torch.manual_seed(0)

# A pair is two noisy views of one hidden vector; group 1 has more noise, and 5 % of all pairs are
# mismatched.
hidden = torch.randn(PAIRS, 16)
group = (torch.rand(PAIRS) < 0.3).long()
noise = torch.where(group == 1, 0.6, 0.3)[:, None]
images = hidden + noise * torch.randn(PAIRS, 16)
texts = hidden + noise * torch.randn(PAIRS, 16)
mismatched = torch.rand(PAIRS) < 0.05
texts[mismatched] = texts[mismatched].roll(1, 0)

image_tower, text_tower = nn.Linear(16, 16), nn.Linear(16, 16)
logit_scale = nn.Parameter(torch.tensor(2.0))
parameters = [*image_tower.parameters(), *text_tower.parameters(), logit_scale]
optimizer = torch.optim.AdamW(parameters, lr=1e-2)

loss = FairLoss(
    ClipLoss(),
    miner=BadPairMiner(PAIRS, faulty_sigma=1.5, warmup_epochs=3),
    fairness=SinkhornFairnessLoss(num_groups=2),
)
# Whatever dataset you have: let it yield each pair's row number besides.
dataset = TensorDataset(images, texts, group, torch.arange(PAIRS))
for epoch in range(EPOCHS):
    for image, text, groups, pair_ids in DataLoader(dataset, 64, shuffle=True, drop_last=True):
        losses = loss(
            image_features=F.normalize(image_tower(image), dim=-1),
            text_features=F.normalize(text_tower(text), dim=-1),
            logit_scale=logit_scale.exp(),
            pair_ids=pair_ids,
            groups=groups,
            output_dict=True,
        )
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    summary = loss.end_epoch()
    terms = "  ".join(f"{name} {float(value.detach()):.4f}" for name, value in losses.items())
    print(f"epoch {epoch:2d}  {terms}  faulty {summary.faulty:2d}")

report = loss.miner.report()
flagged = torch.zeros(PAIRS, dtype=torch.bool)
flagged[torch.from_numpy(report.ids[report.kind == "faulty"])] = True
print(
    f"planted {int(mismatched.sum())} mismatched pairs, flagged {int(flagged.sum())}, "
    f"rightly {int((flagged & mismatched).sum())}"
)
for code in (0, 1):
    rate = flagged[group == code].float().mean()
    print(f"flag rate of group {code}: {rate:.1%}")
