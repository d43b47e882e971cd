"""`fusedloss extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def extract(
    inputs: Annotated[Path, typer.Argument(help="folder of class folders, or a .csv, .tsv, .jsonl or .npz file")],
    out: Annotated[Path, typer.Argument(help="the bank: a new folder, or one whose extraction was interrupted")],
    backbone: Annotated[str, typer.Option(help="timm:NAME or hf:NAME; an hf NAME may be a local folder")],
    weights: Annotated[
        Path | None,
        typer.Option(help="local .safetensors or .pth weights [default: pretrained, from the hub or its cache]"),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="hf: cls or mean over tokens [default: cls for images that have such a token, else mean]"),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="timm: edge in pixels [default: the network's own]")] = None,
    crop: Annotated[
        float | None,
        typer.Option(help="timm: share of the edge that the centre crop keeps, 1 for all [default: the network's own]"),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="text: tokens kept [default: the network's own limit, at most 512]")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="scale every feature row to L2 norm one")] = False,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="fix the classes and their order: another bank, or a file with one name per line "
            "[default: those of the inputs, sorted]"
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="how features are stored: float16 or float32")] = "float16",
    precision: Annotated[
        str, typer.Option(help="the backbone's arithmetic: float32, or autocast to bfloat16 or float16")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N")] = "auto",
    batch_size: Annotated[int, typer.Option(help="inputs per forward pass")] = 64,
    workers: Annotated[int, typer.Option(help="processes that read and decode inputs; 0: the main one")] = 0,
    progress: Annotated[bool, typer.Option(help="show a progress bar on a terminal")] = True,
) -> None:
    """Compute features of images or texts once, and keep them in a feature bank.

    \b
    Inputs: images in class folders; a table (.csv, .tsv, .jsonl) with columns path or text, label, and
    optionally group (rows of a group are never split between training and validation); packed images
    (.npz with images, labels). An interrupted extraction is resumed by the same command, and ends with
    the same bits.

    \b
    Examples:
      fusedloss extract photos/ bank --backbone timm:vit_small_patch14_dinov2
      fusedloss extract glyphs.npz bank --backbone timm:tf_efficientnet_lite0 --weights lite0.pth --crop 1
      fusedloss extract reviews.csv bank --backbone hf:sentence-transformers/all-MiniLM-L6-v2
      fusedloss extract test/ test-bank --classes bank --backbone timm:vit_small_patch14_dinov2
    """
    from fusedloss.cli.classes import read_class_names
    from fusedloss.features import extraction
    from fusedloss.features.loading import load_backbone
    from fusedloss.features.reading import read_inputs

    listed = read_inputs(inputs, class_names=None if classes is None else read_class_names(classes))
    network = load_backbone(
        backbone,
        weights=weights,
        pooling=pooling,
        image_size=image_size,
        crop=crop,
        max_length=max_length,
        precision=precision,
        normalize=normalize,
        device=device,
    )
    typer.echo(f"{len(listed)} {listed.kind}s -> {network.in_features} features each, on {network.device}")
    bank = extraction.extract(
        listed, network, out, dtype=dtype, batch_size=batch_size, workers=workers, progress=progress
    )
    typer.echo(f"{out}: {len(bank)} rows, {bank.in_features} features, {bank.num_classes} classes")
