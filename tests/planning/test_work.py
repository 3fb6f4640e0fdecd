"""FLOPs and bytes of a compiled program, read from its text."""

import jax
import jax.numpy as jnp
import pytest

from gold_jax.losses.fused_head import INNER_TOKENS, InnerTokens, inner_logp_sums
from gold_jax.planning import hlo
from gold_jax.planning.work import read_work

LAYERS, ROWS, WIDTH = 6, 32, 64
PRODUCT = 2 * ROWS * WIDTH * WIDTH


def work(text: str, trips=lambda loop: 1) -> tuple[float, float]:
    program = hlo.read(text)
    return read_work(program, hlo.executed(program, trips))


def compiled(function, *shapes: tuple[int, ...]) -> str:
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def lines(body: str, before: str = "") -> tuple[float, float]:
    return work(f"HloModule m\n{before}\nENTRY main {{\n{body}\n}}\n")


def test_a_product_in_a_loop_counts_as_often_as_the_loop_runs():
    def layers(weights, x):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

    text = compiled(layers, (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH))
    flops, moved = work(text)
    assert flops == LAYERS * PRODUCT
    # Of the stacked weights each trip reads its own.
    assert LAYERS * WIDTH * WIDTH * 4 <= moved < 6 * LAYERS * WIDTH * WIDTH * 4


def test_a_loop_that_does_not_say_runs_as_often_as_it_is_told():
    def repeated(x, weight, n):
        return jax.lax.fori_loop(0, n[0].astype(int), lambda _, x: x @ weight, x)

    text = compiled(repeated, (ROWS, WIDTH), (WIDTH, WIDTH), (1,))
    assert work(text)[0] == PRODUCT and work(text, lambda loop: 7)[0] == 7 * PRODUCT
    assert work(text, lambda loop: 0 if "while" in loop else 1)[0] == 0


def test_loops_over_inner_tokens_are_known_by_their_scope_either_models():
    def sums(hidden, head, row, live):
        inner = InnerTokens(row, row, row, live[0])
        return inner_logp_sums(lambda logits, columns: logits[:, 0], 2, hidden, head, row, inner)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 4), (16, 4))]
    shapes += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4,), (1,))]
    # Not the compiled text: that of an earlier version may lie in the compilation cache.
    assert f"{INNER_TOKENS}/while" in jax.jit(sums).lower(*shapes).as_text(debug_info=True)


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("f32[8,32]{1,0} convolution(a, b), dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
        ("f32[8,32]{1,0} convolution(a, b), dim_labels=bf_io->bf, operand_precision={highest,highest}", 12 * 8 * 16 * 32),
        ("f32[8,32]{1,0} dot(a, b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 8 * 16 * 32),
        # As TPUs multiply with several heads: one tap of each window is no padding.
        ("f32[8,5,4]{2,1,0} convolution(c, d), window={size=5 pad=4_4 rhs_reversal=1}, dim_labels=bf0_0oi->b0f", 2 * 8 * 16 * 20),
        ("f32[8,5,4]{2,1,0} convolution(f, d), window={size=5 stride=4 lhs_dilate=5}, dim_labels=bf0_0oi->b0f", 2 * 8 * 16 * 20),
        ("f32[8,32]{1,0} add(e, e)", 0),
    ],
)  # fmt: skip
def test_products_are_counted_however_they_are_written(line, flops):
    shapes = {"a": "f32[8,16]{1,0}", "b": "f32[16,32]{1,0}", "c": "f32[8,16,1]{1,0,2}", "d": "f32[5,4,16]{2,1,0}"}
    shapes |= {"e": "f32[8,32]{1,0}", "f": "f32[8,16,5]{1,0,2}"}
    given = "".join(f"  {name} = {type_} parameter({at})\n" for at, (name, type_) in enumerate(shapes.items()))
    assert lines(f"{given}  ROOT r = {line}")[0] == flops


def test_attention_kernels_are_counted_by_their_shapes():
    given = "".join(f"  {name} = bf16[2,{heads},64,16]{{3,2,1,0}} parameter({at})\n" for at, (name, heads) in enumerate({"q": 8, "k": 2, "v": 2}.items()))  # fmt: skip

    def flops(kernel):
        line = (
            f'  ROOT {kernel} = bf16[2,8,64,16]{{3,2,1,0}} custom-call(q, k, v), custom_call_target="tpu_custom_call"'
        )
        return lines(given + line)[0] / (2 * 2 * 8 * 64 * 64 * 16 / 2)

    assert [flops(f"splash_mha_{name}") for name in ("fwd_residuals", "dq.1", "dkv")] == [2, 3, 4]


DIMENSIONS = '"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}'


@pytest.mark.parametrize(("precision", "passes"), [("DEFAULT", 1), ("HIGHEST", 6)])
@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul"])
def test_products_that_cublas_makes_are_counted_and_its_scratch_memory_is_not(target, precision, passes):
    config = f'"gemm_backend_config":{{"alpha_real":1,{DIMENSIONS},"precision_config":{{"operand_precision":["{precision}","{precision}"],"algorithm":"ALG_UNSET"}}}}'
    flops, moved = lines(f"""  %a = bf16[4,8,16]{{2,1,0}} parameter(0)
  %b = bf16[4,16,32]{{2,1,0}} parameter(1)
  %c = (f32[4,8,32]{{2,1,0}}, s8[4194304]{{0}}) custom-call(%a, %b), custom_call_target="{target}", backend_config={{"operation_queue_id":"0",{config}}}
  ROOT %r = f32[4,8,32]{{2,1,0}} get-tuple-element(%c), index=0""")
    assert flops == passes * 2 * 4 * 8 * 16 * 32
    assert moved == 2 * 4 * 8 * 16 + 2 * 4 * 16 * 32 + 4 * 4 * 8 * 32


def test_products_in_the_fusions_of_triton_are_counted_their_parts_too():
    inner = """
%gemm_fusion_dot.1_computation (parameter_0: bf16[8,4,16], parameter_1: bf16[4,16,32]) -> f32[4,8,32] {
  %parameter_0 = bf16[8,4,16]{2,1,0} parameter(0)
  %parameter_1 = bf16[4,16,32]{2,1,0} parameter(1)
  ROOT %dot.2 = f32[4,8,32]{2,1,0} dot(%parameter_0, %parameter_1), lhs_batch_dims={1}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}, backend_config={"sizes":["16"]}
}
"""
    body = """  %a = bf16[8,4,16]{2,1,0} parameter(0)
  %b = bf16[4,16,32]{2,1,0} parameter(1)
  ROOT %g = f32[4,8,32]{2,1,0} fusion(%a, %b), kind=kCustom, calls=%gemm_fusion_dot.1_computation, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}"""
    assert lines(body, inner) == (2 * 8 * 64 * 32, 2 * 8 * 64 + 2 * 64 * 32 + 4 * 4 * 8 * 32)


@pytest.mark.parametrize(
    ("mask", "window", "pairs"),
    [("PADDING_CAUSAL", 0, 64 * 64 / 2), ("PADDING", 0, 64 * 64), ("CAUSAL", 16, 64 * 16 - 16 * 16 / 2)],
)
def test_attention_of_cudnn_is_counted_by_what_it_may_see(mask, window, pairs):
    config = f'"intermediate_tensor_shape": {{"element_type": "BF16", "dimensions": ["2", "8", "64", "64"], "tuple_shapes": []}}, "is_flash_attention": true, "mask_type": "{mask}", "sliding_window_length": {window}'
    given = "".join(f"  %{name} = bf16[2,64,{heads},16]{{3,2,1,0}} parameter({at})\n" for at, (name, heads) in enumerate({"q": 8, "k": 2, "v": 2}.items()))  # fmt: skip

    def flops(target):
        line = f'  ROOT %x = (bf16[2,8,64,16]{{3,1,2,0}}, f32[2,8,64]{{2,1,0}}, u8[1024]{{0}}) custom-call(%q, %k, %v), custom_call_target="{target}", backend_config={{"cudnn_fmha_backend_config": {{{config}}}}}'
        return lines(given + line)[0]

    product = 2 * 2 * 8 * pairs * 16
    assert flops("__cudnn$fmhaSoftmax") == 2 * product and flops("__cudnn$fmhaSoftmaxBackward") == 5 * product


def test_a_fusion_that_runs_meanwhile_moves_what_it_would_otherwise():
    inner = """
%sliced (all: f32[10,256], at: s32[]) -> f32[1,256] {
  %all = f32[10,256]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,256]{1,0} dynamic-slice(%all, %at, %zero), dynamic_slice_sizes={1,256}
}
"""
    body = """  %p = f32[10,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %s = ((f32[10,256]{1,0}, s32[]), f32[1,256]{1,0}, u32[]) fusion-start(%p, %i), kind=kLoop, calls=%sliced
  ROOT %d = f32[1,256]{1,0} fusion-done(%s)"""
    assert lines(body, inner)[1] == 2 * 1024 + 4


def test_what_lies_in_another_memory_is_not_moved():
    fast = "f32[256]{0:T(256)S(1)}"
    body = f"""  p = f32[256]{{0:T(256)}} parameter(0)
  s = ({fast}, f32[256]{{0:T(256)}}, u32[]{{:S(2)}}) copy-start(p)
  d = {fast} copy-done(s)
  x = {fast} negate(d)
  ROOT r = f32[256]{{0:T(256)}} add(x, x)"""
    assert lines(body)[1] == 2 * 1024


def test_a_fusion_reads_its_slices_and_writes_what_is_new():
    inner = """
sliced {
  all = f32[10,256]{1,0} parameter(0)
  at = s32[] parameter(1)
  zero = s32[] constant(0)
  one = f32[1,256]{1,0} dynamic-slice(all, at, zero), dynamic_slice_sizes={1,256}
  new = f32[1,256]{1,0} negate(one)
  ROOT put = f32[10,256]{1,0} dynamic-update-slice(all, new, at, zero)
}
"""
    body = """  p = f32[10,256]{1,0} parameter(0)
  i = s32[]{:S(2)} parameter(1)
  ROOT r = f32[10,256]{1,0} fusion(p, i), kind=kLoop, calls=sliced"""
    assert lines(body, inner)[1] == 2 * 1024


def test_a_fusion_reads_what_a_fusion_in_it_reads():
    inner = """
renamed {
  ROOT b = f32[16,160]{1,0} bitcast(p)
  p = f32[10,256]{1,0} parameter(0)
}

sliced {
  p = f32[10,256]{1,0} parameter(0)
  ROOT s = f32[1,256]{1,0} slice(p), slice={[2:3], [0:256]}
}

outer {
  p = f32[10,256]{1,0} parameter(0)
  q = f32[10,256]{1,0} parameter(1)
  x = f32[16,160]{1,0} fusion(p), kind=kLoop, calls=renamed
  y = f32[1,256]{1,0} fusion(q), kind=kLoop, calls=sliced
  m = f32[16]{0} reduce(x, x), dimensions={1}
  n = f32[16]{0} reduce(y, y), dimensions={0}
  ROOT r = f32[16]{0} add(m, n)
}
"""
    body = """  p = f32[10,256]{1,0} parameter(0)
  q = f32[10,256]{1,0} parameter(1)
  ROOT r = f32[16]{0} fusion(p, q), kind=kLoop, calls=outer"""
    assert lines(body, inner)[1] == 10 * 1024 + 1024 + 64


@pytest.mark.parametrize("fused", [False, True])
def test_a_scatter_writes_what_is_new_into_an_array_that_is_there(fused):
    line = "scatter(%all, %rows, %new), update_window_dims={1}, inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%last"
    given = """  %all = f32[1000,64]{1,0} parameter(0)
  %rows = s32[3,1]{1,0} parameter(1)
  %new = f32[3,64]{1,0} parameter(2)
"""
    last = "%last (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  ROOT %b = f32[] parameter(1)\n}\n"
    inner = f"{last}%inner (all: f32[1000,64], rows: s32[3,1], new: f32[3,64]) -> f32[1000,64] {{\n{given}  ROOT %s = f32[1000,64]{{1,0}} {line}\n}}\n"
    called = "fusion(%all, %rows, %new), kind=kInput, calls=%inner" if fused else line
    assert lines(f"{given}  ROOT %r = f32[1000,64]{{1,0}} {called}", inner)[1] == 12 + 2 * 4 * 3 * 64
