"""Tasks of lm-eval on files of this machine alone."""

import yaml

KINDS = {
    "choice": {
        "file": "world_knowledge/arc_easy.jsonl",
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
    },
    "last_word": {
        "file": "language_understanding/lambada_openai.jsonl",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}} ",
        "doc_to_target": "{{continuation}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "rolling": {
        "file": "reading_comprehension/agi_eval_sat_en.jsonl",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{query}}",
        "metric_list": [
            {"metric": name, "aggregation": name if name == "bits_per_byte" else "weighted_perplexity"}
            for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    },
    "written": {
        "file": "symbolic_problem_solving/svamp.jsonl",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{context}}\n\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n", "Question:", " the p"], "max_gen_toks": 48},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write(kind, folder, data, **more):
    """The task file of a kind, on llm-foundry's files in `data`; its arrays are kept in `folder`."""
    config = KINDS[kind] | {name: value for name, value in more.items() if value is not None}
    source = {"data_files": {"test": str(data / config.pop("file"))}, "cache_dir": str(folder / "arrays")}
    path = folder / f"{kind}.yaml"
    config |= {"task": kind, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
    path.write_text(yaml.safe_dump(config))
    return str(path)
