"""Models that decode rows up to a length: what asks for longer ones is refused before anything is computed."""

import json

import numpy as np
import pytest
import tiny_models as tiny
from safetensors.numpy import load_file, save_file

from gold_jax import (
    DistillationLoss,
    GOLDConfig,
    GOLDTrainer,
    SFTConfig,
    SFTTrainer,
    cli,
    load_model,
    sample_completions,
    score_completions,
    serve,
)
from gold_jax.serving.batcher import longest_sequence

ROWS = [{"prompt": question, "completion": answer} for question, answer in tiny.ROWS]
MOST = 96  # tokens, `original_max_position_embeddings`
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.fixture(scope="module")
def phi(world, tmp_path_factory):
    """The student as a Phi 3 with LongRoPE."""
    folder = tiny.write_student(tmp_path_factory.mktemp("phi"))
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    config |= {
        "model_type": "phi3",
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": MOST,
        "pad_token_id": 0,
    }
    fused = {"self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
    fused |= {"mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"]}
    for at in (f"model.layers.{layer}" for layer in range(config["num_hidden_layers"])):
        for name, parts in fused.items():
            held = [tensors.pop(f"{at}.{part}.weight") for part in parts]
            tensors[f"{at}.{name}.weight"] = np.concatenate(held)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def trainer(student, teacher, output, eval_dataset=None, **settings):
    args = GOLDConfig(output_dir=output, max_steps=1, max_length=160, save_strategy="no", **settings)
    return GOLDTrainer(student, str(teacher), args, ROWS, eval_dataset, console=tiny.quiet_console())


def test_completions_in_training(phi, world, tmp_path):
    words = (
        rf"in training \(--max_prompt_length .* come to 160 tokens; the phi3 model can decode rows of at most {MOST}"
    )
    with pytest.raises(ValueError, match=f"prompts and the student's completions {words}"):
        trainer(phi, world / "teacher", tmp_path, max_completion_length=64)
    with pytest.raises(ValueError, match=f"prompts and the teacher's completions {words}"):
        trainer(str(world / "sibling"), phi, tmp_path, max_completion_length=64, lmbda=0.0, seq_kd=True)
    trainer(phi, world / "teacher", tmp_path, max_completion_length=16, max_prompt_length=80, lmbda=1.0).train()
    writes = dict(max_completion_length=16, max_prompt_length=48, lmbda=0.0, seq_kd=True)
    trainer(str(world / "sibling"), phi, tmp_path, **writes)
    with pytest.raises(
        ValueError, match="the longest prompt of the data, as the teacher reads it, and 16 new tokens come to"
    ):
        trainer(str(world / "sibling"), phi, tmp_path, teacher_context="What there is to know. " * 8, **writes)


def test_rows_of_the_data_may_be_longer(phi, world, tmp_path):
    row = {"prompt": "What is it?", "completion": " ".join(answer for _, answer in tiny.ROWS * 3)}
    args = GOLDConfig(output_dir=tmp_path, max_steps=1, max_length=400, lmbda=0.0, logging_steps=1)
    run = GOLDTrainer(phi, str(world / "teacher"), args, [row], console=(console := tiny.quiet_console()))
    assert f"LongRoPE: writes in rows of up to {MOST} tokens)" in console.export_text()
    assert len(run.student.chat_tokenizer.encode_completion(row["completion"]).ids) > MOST
    run.train()
    assert np.isfinite(run.log_history[0]["loss"])


def test_rows_on_either_side_that_begin_alike_are_read_each_by_its_own_length(phi, world, tmp_path):
    texts = "72.", " ".join(answer for _, answer in tiny.ROWS * 3)
    rows = [{"prompt": "What is 24 + 48?", "completion": text} for text in texts]
    common = dict(max_length=400, max_steps=1, logging_steps=1, save_strategy="no", learning_rate=0.0)
    for make, models, more in (
        (GOLDTrainer, (phi, str(world / "teacher")), {"lmbda": 0.0}),
        (GOLDTrainer, (str(world / "sibling"), phi), {"lmbda": 0.0}),
        (SFTTrainer, (phi,), {"completion_only_loss": True}),
    ):
        losses = []
        for together in (1, 2):
            sizes = {"per_device_train_batch_size": together, "gradient_accumulation_steps": 2 // together}
            args = (GOLDConfig if make is GOLDTrainer else SFTConfig)(output_dir=tmp_path, **common, **sizes, **more)
            run = make(*models, args, rows, console=tiny.quiet_console())
            run.train()
            losses.append(run.log_history[0]["loss"])
        np.testing.assert_allclose(*losses, rtol=1e-6)
    alone, together = (score_completions(phi, rows=rows, batch_size=size).bits for size in (1, 2))
    np.testing.assert_allclose(alone, together, rtol=1e-6)
    measure = DistillationLoss(phi, str(world / "teacher"), GOLDConfig(normalization="row_mean", max_length=400))
    together, *alone = (measure(measure.params, measure.batch(some))[0] for some in (rows, rows[:1], rows[1:]))
    np.testing.assert_allclose(together, np.mean(alone), rtol=1e-6)


def test_completions_in_evaluation(phi, tmp_path):
    args = SFTConfig(output_dir=tmp_path, max_steps=1, predict_with_generate=True)
    words = rf"the longest prompt of the evaluation data and 128 new tokens come to .* of at most {MOST}"
    with pytest.raises(ValueError, match=words):
        SFTTrainer(phi, args, ROWS, ROWS, console=tiny.quiet_console())


def test_completions_of_prompts_of_one_s_own(phi):
    drawn = sample_completions(phi, prompts=["Greet me."], max_new_tokens=MOST // 2)
    assert len(drawn[0].ids)
    with pytest.raises(ValueError, match="the longest prompt and max_new_tokens come to"):
        sample_completions(phi, prompts=["Greet me."], max_new_tokens=MOST)


def test_sequences_of_a_server(phi, capsys):
    assert longest_sequence(load_model(phi)) == 64  # slots are powers of two
    pytest.importorskip("uvicorn")
    with pytest.raises(SystemExit) as end:
        cli.run("gold_jax.serve", serve.main, ["--model_name_or_path", phi, "--max_length", "90", "--port", "0"])
    assert end.value.code == 2 and "for --max_length come to 128 tokens" in capsys.readouterr().err
