import pytest
import torch

from resq_rl.quantization.graph.dependence import multiplies

MULTIPLY = """mm addmm bmm baddbmm addbmm mv addmv dot vdot convolution conv1d conv3d linear matmul _trilinear _int_mm
    conv_tbc _scaled_dot_product_flash_attention_for_cpu _native_multi_head_attention _transformer_encoder_layer_fwd
    mkldnn_rnn_layer _thnn_fused_lstm_cell _cdist_forward _fft_r2c _embedding_bag_forward_only"""
FLOAT = """add mul relu_ sigmoid softmax hardswish_ clamp mean sum var_mean max_pool2d_with_indices avg_pool2d embedding
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_linear1d upsample_trilinear3d upsample_bicubic2d
    native_batch_norm native_group_norm native_layer_norm clone _to_copy view t roll conj pixel_shuffle constant_pad_nd
    grid_sampler_2d"""


@pytest.mark.parametrize("name", MULTIPLY.split())
def test_operators_that_multiply_and_accumulate(name: str) -> None:
    packet = getattr(torch.ops.aten, name)
    assert all(multiplies(getattr(packet, overload)) for overload in packet.overloads())


@pytest.mark.parametrize("name", FLOAT.split())
def test_operators_that_run_in_float(name: str) -> None:
    packet = getattr(torch.ops.aten, name)
    assert not any(multiplies(getattr(packet, overload)) for overload in packet.overloads())
