"""The GFLOPs columns of the paper, and beside them baselines.multiply_adds of every compared model.

`python -m experiments.costs --flops` prints the table. Imports baselines.py only.
"""

from dataclasses import replace

from experiments.baselines import multiply_adds, preset

# The paper's GFLOPs columns. Key: table, pixels, size. Value: {model: printed figure}.
# fmt: off
PAPER_GFLOPS = {
    ("1", 256, "S/2"): {
        "DiT": 6.06, "DiG": 5.92, "PixArt": 5.78, "EDiT": 5.91, "Sana": 5.97,
        "DyDi-LiT": 5.98,
    },
    ("1", 256, "B/2"): {
        "DiT": 10.50, "DiG": 10.43, "PixArt": 10.13, "EDiT": 10.45, "Sana": 10.38,
        "DyDi-LiT": 10.39,
    },
    ("1", 256, "L/2"): {
        "DiT": 23.01, "DiG": 23.58, "PixArt": 22.45, "EDiT": 23.39, "Sana": 22.83,
        "DyDi-LiT": 22.85,
    },
    ("2", 512, "L/2"): {
        "DiT": 106.42, "DiG": 94.15, "PixArt": 97.38, "EDiT": 96.17, "Sana": 98.46,
        "DyDi-LiT": 98.55,
    },
    # Table 5 is the only ablation with GFLOPs
    ("5", 256, "S/2"): {"map-wise": 6.45, "ladder-4-difference": 5.98},
    # MoH and LiT are in Table 3, which has no such column; FLatten and MHLA are in no table
    (None, 256, "S/2"): {"MoH": None, "LiT": None, "FLatten": None, "MHLA": None},
}
# fmt: on
HEADER = """\
| table | model | blocks | paper | counted | | left out | total |
|---|---|---:|---:|---:|---:|---:|---:|"""


def counted(pixels, size, model):
    """(blocks, GFLOPs as the paper counts them, GFLOPs that the paper leaves out) of one model.

    `size` is a preset of dydilit.py; images are latents of pixels / 8.
    """
    config = preset(size if model == "DyDi-LiT" else f"{model}-{size}")
    inside, left_out = multiply_adds(replace(config, input_size=pixels // 8))
    return config.depth, inside / 1e9, left_out / 1e9


def table():
    """A Markdown table of every model in PAPER_GFLOPS."""
    lines = [HEADER]
    for (number, pixels, size), models in PAPER_GFLOPS.items():
        for model, printed in models.items():
            depth, gflops, left_out = counted(pixels, size, model)
            cells = [
                number or "",
                f"{model}, {size}, {pixels} px",
                str(depth),
                f"{printed:.2f}" if printed else "",
                f"{gflops:.2f}",
                f"{gflops / printed - 1:+.2%}" if printed else "",
                f"{left_out:.2f}" if left_out else "",
                f"{gflops + left_out:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
