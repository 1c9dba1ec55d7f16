"""The card of a model in Markdown, from its manifest alone: what it is, whose terms it is under, scores, limits.

Knows a manifest's entries. Does not know how they came about, nor where the card is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.bootstrap import format_interval
from train.metrics import ROUGE_TYPES
from train.records import MANIFEST


def format_card(manifest: dict[str, Any]) -> str:
    """The model card in Markdown, from the manifest alone."""
    data, settings = manifest["data"], manifest["settings"]
    model, generation = settings.get("model", {}), settings.get("generation", {})
    lines = [
        *_front_matter(model),
        f"# {manifest['name']} {manifest['version']}",
        "",
        f"An encoder-decoder for summarisation with {manifest['parameters'] / 1e6:.1f} M parameters, stored in fp16.",
    ]
    if model:
        shared = _shared(model)
        lines += [
            "",
            f"Warm-started from `{_name(model, 'encoder')}` (encoder) and `{_name(model, 'decoder')}` (decoder, "
            f"with new cross-attention){shared}, then fine-tuned on {data['name']}{_epochs(manifest)}. "
            f"The exact settings stand in `{MANIFEST}`.",
        ]
    if averaged := manifest.get("training", {}).get("average"):
        lines += ["", f"Its weights are the mean of several checkpoints: {', '.join(averaged['checkpoints'])}."]
    lines += ["", "## Licence", ""]
    sources = data.get("sources") or [{**data, "use": "fine-tuning"}]
    if data["non_commercial"]:
        forbidding = ", ".join(f"{s['name']} ({s['licence']})" for s in sources if s["non_commercial"])
        lines += [
            f"**NON-COMMERCIAL USE ONLY.** These weights were trained on {forbidding}: they may not be used "
            "commercially.",
            "",
        ]
    lines += [f"Fine-tuned on {data['name']}, whose licence is {data['licence']}."]
    others = [source for source in sources if source["use"] != "fine-tuning"]
    if others:
        lines += ["", "What else went into the weights:", ""]
        lines += [f"- {source['name']}, licence {source['licence']}: {source['use']}." for source in others]
    if data["splits"]:
        lines += ["", "## Data", "", "| split | rows used | SHA-256 of ids and texts |", "|---|---|---|"]
        lines += [f"| {split} | {found['rows']} | `{found['sha256']}` |" for split, found in data["splits"].items()]
        leaks = data.get("leaks")
        if leaks:
            found = ", ".join(f"{count} of {split}" for split, count in leaks.items())
            lines += [
                "",
                f"Documents that also stood in train: {found}. {data['dropped']} rows of train (these and repeats) "
                "were left out.",
            ]
    lines += ["", "## Scores", "", *_scores(manifest["metrics"])]
    if elsewhere := manifest.get("elsewhere"):
        lines += ["", "## On other data", "", "It was not trained on these.", "", *_scores(elsewhere)]
    lines += [
        "",
        "## Sample outputs",
        "",
        "The first rows of validation, not chosen; the texts are in the data set.",
        "",
    ]
    lines += ["| row | summary |", "|---|---|"]
    lines += [f"| {row['id']} | {_cell(row['summary'])} |" for row in manifest["samples"]]
    limits = [
        "- It reads at most 512 tokens." if not generation else f"- {_lengths(settings, generation)}",
        "- Summaries may state what the text does not say, and may mix up who said what. Check them before use.",
        f"- It knows texts like those of {data['name']}, in their language"
        + ("." if elsewhere else "; on others it was not measured."),
        *(f"- {sentence}" for sentence in manifest.get("limits", [])),
    ]
    lines += ["", "## Limits", "", *limits]
    lines += [
        "",
        "## Checks at export",
        "",
        f"On {manifest['parity']['rows']} validation rows the engine and `generate` of transformers "
        f"{manifest['libraries']['transformers']} gave the same tokens in fp32{_ties(manifest['parity'])}; stock "
        "`EncoderDecoderModel.from_pretrained` finds every weight.",
        f"Commit {manifest['git_commit']}, {manifest['created']}.",
        "",
    ]
    return "\n".join(lines)


def _shared(model: dict[str, Any]) -> str:
    """What the two sides had in common while they were trained, and how many layers the decoder kept."""
    words = ""
    if model.get("decoder_layers") is not None:
        words += f", {model['decoder_layers']} of the decoder's layers"
    if added := model.get("added_tokens"):
        words += f", {len(added)} words added to the vocabulary"
    if model.get("share_weights"):
        return words + ", all weights that both sides have shared while training"
    return words + ", word embeddings shared while training" if model["share_embeddings"] else words


def _front_matter(model: dict[str, Any]) -> list[str]:
    """What hubs read: the bases by their public names. A folder without one may look like an id: it is not named."""
    names = dict.fromkeys(model[key] for key in ("encoder_name", "decoder_name") if model.get(key))
    return ["---", "base_model:", *(f"- {name}" for name in names), "---", ""] if names else []


def _ties(parity: dict[str, Any]) -> str:
    """The exceptions, where fp32 could not tell two hypotheses apart."""
    count = parity.get("settled_in_float64", 0)
    return f", except on {count} too close for fp32, where `generate` in fp64 gave the engine's" if count else ""


def _epochs(manifest: dict[str, Any]) -> str:
    """How long it was trained, as the Trainer counted it; nothing where no run says so."""
    epochs = manifest.get("training", {}).get("train", {}).get("epoch")
    return "" if epochs is None else f" for {epochs:.3g} epochs"


def _scores(metrics: dict[str, Any]) -> list[str]:
    if not metrics:
        return ["Not evaluated yet."]
    lines = []
    for name, result in metrics.items():
        settings = result["settings"]
        first = "the first " if settings["limit"] else ""
        leaks = result["data"].get("leaks_dropped")
        without = f" ({leaks} whose document also stands in train left out)" if leaks else ""
        lines += [
            f"{name[0].upper()}{name[1:]}: {first}{result['data']['rows']} rows{without}, against "
            f"{_references(settings['references'])}, decoded in {settings['dtype']}; {settings['rouge']}, with 95 % "
            f"bootstrap intervals; data `{result['data']['sha256'][:12]}`.",
            "",
            "| | ROUGE-1 | ROUGE-2 | ROUGE-L | words |",
            "|---|---|---|---|---|",
        ]
        for system, scores in result["scores"].items():
            label = f"lead-{settings['lead']}" if system.startswith("lead") else "this model"
            cells = " | ".join(format_interval(scores[name]) for name in ROUGE_TYPES)
            lines.append(f"| {label} | {cells} | {result['mean_words'][system]} |")
        cells = " | ".join(
            f"{format_interval(result['difference'][name])}, p = {result['difference'][name]['p_value']:.4f}"
            for name in ROUGE_TYPES
        )
        lines += [f"| difference (paired) | {cells} | |"]
        lines += ["", f"References have {result['mean_words']['references']} words on average.", ""]
    return lines[:-1]


def _references(use: str) -> str:
    return {"first": "the first reference", "mean": "all references, averaged", "best": "the best reference"}[use]


def _lengths(settings: dict[str, Any], generation: dict[str, Any]) -> str:
    return (
        f"It was trained on sources of at most {settings['data']['max_source_tokens']} tokens and writes at most "
        f"{generation['max_length'] - 1}. Decoding: {generation['num_beams']} beams, `length_penalty` "
        f"{generation['length_penalty']}, `min_length` {generation['min_length']}, `no_repeat_ngram_size` "
        f"{generation['no_repeat_ngram_size']} (`generation_config.json`)."
    )


def _name(model: dict[str, Any], side: str) -> str:
    """The public name of a base, or else what its folder is called."""
    return model.get(f"{side}_name") or short_name(model[side])


def short_name(name: str) -> str:
    """A hub id as it is; of a folder on a disk only its last two parts."""
    return "/".join(part for part in Path(name).parts[-2:] if part not in ("/", "..")) if is_folder(name) else name


def is_folder(name: str) -> bool:
    """Whether a checkpoint is named by where it lies, not by a hub's id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_dir()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
