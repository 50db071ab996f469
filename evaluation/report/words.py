"""How sets, methods and metrics are called on the report."""

from __future__ import annotations

METHODS = {
    "generator": "generator alone",
    "gill": "GILL",
    "clip": "CLIP, last caption",
    "clip_captions": "CLIP, five captions",
    "linear": "linear",
    "mlp": "MLP",
    "encoder": "transformer encoder",
    "language_model": "language model alone",
    "always_retrieve": "always retrieve",
    "always_generate": "always generate",
    "random": "random",
    "heuristic": "similarity threshold",
    "human": "people",
    "glide": "GLIDE",
    "fromage": "FROMAGe",
    "frozen": "Frozen",
    "magma": "MAGMA",
    "make_a_scene": "Make-A-Scene",
    "dalle_2": "DALL-E 2",
    "lafite2": "LAFITE2",
    "imagen": "Imagen",
    "parti": "Parti",
    "re_imagen": "Re-Imagen",
}
METRICS = {
    "oracle_attributes": "right attributes",
    "oracle_exact": "wholly right",
    "clip_similarity": "CLIP similarity",
    "lpips": "LPIPS (lower is better)",
    "fid": "FID (lower is better)",
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "recall_at_10": "R@10",
    "image_to_text_recall_at_1": "text for picture R@1",
    "image_to_text_recall_at_5": "R@5",
    "image_to_text_recall_at_10": "R@10",
    "macro_f1": "macro F1",
    "f1_gen": "F1 of generate",
    "f1_ret": "F1 of retrieve",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "attributes_named": "attributes named",
    "attributes_right": "of these right",
    "vqa_accuracy": "VQA accuracy",
    "seconds": "seconds",
    "tokens_per_second": "tokens per second",
}
SETS = {
    "coco_fid": "COCO, random captions",
    "coco_captioning": "Captions of COCO pictures",
    "vqa": "Questions about pictures",
    "decision": "Retrieve or generate",
    "captions": "one caption",
}
TABLES = {
    "captions": "One caption (the CC3M columns of Tables 3 and 4)",
    "retrieval": "Retrieval of complete captions (no table of the paper)",
    "table_1": "Table 1: pictures from stories (VIST)",
    "table_2": "Table 2: pictures from dialogues (VisDial)",
    "table_5": "Table 5: contextual retrieval on stories (VIST)",
    "table_6": "Table 6: retrieve or generate (PartiPrompts)",
    "table_7": "Table 7: captions of pictures (COCO) and questions about them (VQAv2)",
    "table_8": "Table 8: FID on COCO",
    "latency": "Latency (appendix E.4)",
}
NOTES = {
    "captions": "Held-out captions, read alone; the paper has FID of this in Tables 3 and 4.",
    "table_1": "The last picture of a story. The generator alone reads words only.",
    "table_2": "The picture that a dialogue is about, from its first rounds.",
    "table_5": "The last picture of a story among all pictures of all stories. The paper quotes "
    "its CLIP row and does not say what CLIP read.",
    "table_6": "Macro F1 on held-out prompts. Labels are people's votes; on the miniature world "
    "the oracle's. The paper's ranges go over thresholds; shown is the one at 0.5.",
    "table_7": "Greedy, zero-shot. Beside the paper's own numbers those that it quotes.",
    "table_8": "Pictures from random captions; the paper draws 30,000.",
    "latency": "Batch of 1 on this machine; the paper's on one A6000 with the real models.",
}


def method_name(method: str) -> str:
    """For people; an unknown one as it is."""
    return METHODS.get(method, method)


def set_name(name: str) -> str:
    """`story_5_pictures` -> `story, 5 captions and 4 pictures`, where no title is at hand."""
    if name in SETS:
        return SETS[name]
    kind, _, rest = name.partition("_")
    number = rest.partition("_")[0]
    if kind == "story" and number.isdigit():
        words = f"story, {number} caption{'s' * (number != '1')}"
        return f"{words} and {int(number) - 1} pictures" if name.endswith("pictures") else words
    if kind == "dialogue" and number.isdigit():
        return f"dialogue, {number} round{'s' * (number != '1')}"
    return name.replace("_", " ")
