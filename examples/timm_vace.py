"""Fine-tunes a timm network on the glyph images with VACELoss: a plain PyTorch loop with two lines of fusedloss.

python examples/timm_vace.py --steps 200 --checkpoint run.pt     # run it again to go on where it stopped
"""

import argparse
from pathlib import Path

import numpy as np
import timm
import torch

import fusedloss

GLYPHS = Path(__file__).parent / "glyphs" / "glyphs.npz"


def batch(images, labels, size, step, seed):
    """The batch of one step: it depends on seed and step alone, so that a resumed run sees the same ones."""
    rows = torch.from_numpy(np.random.default_rng((seed, step)).integers(len(labels), size=size))
    return images[rows].float().div(127.5).sub(1.0).unsqueeze(1), labels[rows]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_efficientnet", help="timm network (default: %(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights (needs the network)")
    parser.add_argument("--steps", type=int, default=200, help="steps in all (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a batch (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of AdamW (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument(
        "--checkpoint", type=Path, help="saved after every 20 steps and at the end; resumed from if there"
    )
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    data = np.load(GLYPHS)
    images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"]).long()
    num_classes = len(data["class_names"])
    model = timm.create_model(
        args.model, pretrained=args.pretrained, num_classes=num_classes, in_chans=1, drop_rate=0.0
    )

    loss = fusedloss.VACELoss(model.head_hidden_size, num_classes)
    loss.watch(model.get_classifier())

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    losses = []
    if args.checkpoint and args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=True)
        losses = state["losses"]
        for name, holder in (("model", model), ("loss", loss), ("optimizer", optimizer)):
            holder.load_state_dict(state[name])

    model.train()
    for step in range(len(losses), args.steps):
        x, y = batch(images, labels, args.batch_size, step, args.seed)
        value = loss(model(x), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
        last = step + 1 == args.steps
        if (step + 1) % 20 == 0 or last:
            tau = loss.temperature
            print(f"step {step + 1}: loss {losses[-1]:.4f}, temperatures {tau.min():.3f} to {tau.max():.3f}")
            if args.checkpoint:
                save(args.checkpoint, {"losses": losses, "model": model, "loss": loss, "optimizer": optimizer})

    model.eval()
    with torch.inference_mode():
        x, y = batch(images, labels, 512, 10**6, args.seed)
        predicted = loss.scaled_logits(model(x)).argmax(1)
    print(f"accuracy on 512 training images: {(predicted == y).float().mean():.3f}")
    return losses, loss


def save(path, holders):
    """Whole or not at all: written under another name, then renamed."""
    state = {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in holders.items()}
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


if __name__ == "__main__":
    main()
