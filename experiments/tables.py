"""The tables of finished runs of ablate.py, as Markdown.

    quality      loss, samples and costs of every model
    differences  each model minus the one that the paper compares it with, seed by seed
    behaviour    what the attentions do: rows, routes, lambdas

Each takes {model: {seed: result}}, the result of one run as ablate.py writes it into result.json.
Runs that diverged are counted beside the model's name and are in no other figure. Imports nothing
of the project.
"""

import math
import statistics

COLUMNS = {
    "held_out_loss": "held-out loss",
    "held_out_mse": "noise error",
    "class_accuracy": "class accuracy",
    "frechet_distance": "Frechet distance",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "feature_distance": "Frechet distance, features",
}
HALVES = {  # as eval_min.evaluate names the same figures of two halves of the real images
    "frechet_distance": "frechet_halves",
    "kid": "kid_halves",
    "precision": "precision_halves",
    "recall": "recall_halves",
    "feature_distance": "feature_distance_halves",
}
PERCENT = ("class_accuracy", "precision", "recall")
DYDILIT = "DyDi-LiT"
BESIDE = {  # whom a model differs from in one part: Tables 4, 5 and 6. All others: DyDi-LiT
    "ladder-1-focused": "ladder-0-sana",
    "ladder-2-measure": "ladder-1-focused",
    "ladder-3-projection": "ladder-2-measure",
    "ladder-4-difference": "ladder-3-projection",
    DYDILIT: "ladder-4-difference",
    "map-wise": "ladder-4-difference",
    "rising-lambda": "ladder-4-difference",
    "DiT-glumbconv": "ladder-0-sana",
}


def quality(results, costs):
    """The table of {model: {seed: result}} and {model: [seconds, MiB]} of a training step."""
    sizes = ("model", "seeds", "blocks", "parameters")
    rows = [[*sizes, *COLUMNS.values(), "step, ms", "memory, MiB"]]
    for model, runs in results.items():
        rows.append(quality_row(model, runs, *costs.get(model, (None, None))))
    if half := halves_row(results):
        rows.append(half)
    return markdown(rows)


def quality_row(model, runs, seconds, mib):
    fine = finished(runs)
    diverged = len(runs) - len(fine)
    row = [model + (f" ({diverged} diverged)" if diverged else ""), str(len(runs))]
    if fine:
        some = next(iter(fine.values()))
        row += [str(some["blocks"]), f"{some['parameters'] / 1e6:.2f} M"]
    else:
        row += ["-", "-"]
    for key in COLUMNS:
        row.append(spread([result.get(key) for result in fine.values()], key in PERCENT))
    row.append("-" if seconds is None else f"{1e3 * seconds:.0f}")
    row.append("-" if mib is None else f"{mib:.0f}")
    return row


def halves_row(results):
    """The same figures of one half of the real images against the other; None without samples."""
    for runs in results.values():
        for result in runs.values():
            if "frechet_halves" in result:
                row = ["half of the real images", "", "", ""]
                for key in COLUMNS:
                    row.append(spread([result.get(HALVES.get(key))], key in PERCENT))
                return [*row, "", ""]
    return None


def differences(results):
    """The table of each model minus another, over the seeds that both have; None without any.

    The models of one seed see the same images, in the same order, with the same noise. Percentages
    are subtracted as such.
    """
    rows = [["model", "minus", "seeds", *COLUMNS.values()]]
    for model in results:
        other = BESIDE.get(model, DYDILIT)
        here, there = finished(results[model]), finished(results.get(other, {}))
        both = [seed for seed in here if seed in there]
        if not both:
            continue
        row = [model, other, str(len(both))]
        for key in COLUMNS:
            pairs = [(here[seed].get(key), there[seed].get(key)) for seed in both]
            gaps = [one - two for one, two in pairs if None not in (one, two)]
            row.append(spread(gaps, key in PERCENT))
        rows.append(row)
    return markdown(rows) if len(rows) > 1 else None


def behaviour(results):
    """The table of what the attentions do (probe.py), means over the blocks."""
    kinds = {"projectors": "projector", "kernels": "kernel", "lambdas": "difference"}
    usage_titles = [f"usage entropy, {kind}" for kind in kinds]
    rows = [["model", "row entropy", "row variance", *usage_titles, "mean lambda"]]
    for model, runs in results.items():
        fine = list(finished(runs).values())
        smooth = []  # (entropy, variance) of each seed
        lambdas = []
        for result in fine:
            if "smoothness" in result:
                smooth.append([statistics.fmean(column) for column in zip(*result["smoothness"])])
            if "lambda" in result:
                lambdas.append(statistics.fmean(result["lambda"]))
        row = [model, spread([s[0] for s in smooth]), spread([s[1] for s in smooth])]
        for ending in kinds.values():
            row.append(spread([mean_usage(result, ending) for result in fine]))
        row.append(spread(lambdas))
        rows.append(row)
    return markdown(rows)


def mean_usage(result, ending):
    """Mean usage entropy, over the blocks, of the routers whose name ends so; None without any."""
    entropies = []
    for name, row in result["usage_entropy"].items():
        if name.endswith(ending):
            entropies += row
    return statistics.fmean(entropies) if entropies else None


def finished(runs):
    """{seed: result} without the runs that diverged."""
    return {seed: result for seed, result in runs.items() if "diverged" not in result}


def spread(values, percent=False, digits=None):
    """Numbers, one a seed -> "mean ± standard deviation", with four digits of the mean, or as many
    digits behind the point as asked for.

    None is left out; "-" if nothing is left. Zero has no sign.
    """
    values = [100 * v if percent else v for v in values if v is not None]
    if not values:
        return "-"
    mean = statistics.fmean(values)
    if digits is None:
        digits = 1 if percent else min(5, 3 - math.floor(math.log10(abs(mean) or 1)))
    style = "z.1e" if digits < -3 else f"z.{max(0, digits)}f"
    text = f"{mean:{style}}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):{style}}"
    return text + (" %" if percent else "")


def markdown(rows):
    """Rows of cells as a Markdown table; the first row is the header."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
