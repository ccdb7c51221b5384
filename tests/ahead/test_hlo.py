"""What is read out of compiled programs, against what is known of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pixelstory_jax.ahead import hlo
from pixelstory_jax.ahead.report import summary

MESH = {"data": 1, "fsdp": 4, "tensor": 2}
LOOP = """HloModule jit_f
%fused_slice (p0: f32[8,64,64], p1: s32[]) -> f32[1,64,64] {
  %p0 = f32[8,64,64]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,64,64]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,64}
}
%body (carry: (s32[], f32[32,64], f32[8,64,64])) -> (s32[], f32[32,64], f32[8,64,64]) {
  %carry = (s32[], f32[32,64]{1,0}, f32[8,64,64]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %x = f32[32,64]{1,0} get-tuple-element(%carry), index=1
  %w = f32[8,64,64]{2,1,0} get-tuple-element(%carry), index=2
  %slice = f32[1,64,64]{2,1,0} fusion(%w, %n), kind=kLoop, calls=%fused_slice
  %one = f32[64,64]{1,0} bitcast(%slice)
  %whole = f32[256,64]{1,0} all-gather(%one), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), metadata={op_name="a/b"}
  %y = f32[32,64]{1,0} dot(%x, %one), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %next = (s32[], f32[32,64]{1,0}, f32[8,64,64]{2,1,0}) tuple(%n, %y, %w)
}
%condition (carry: (s32[], f32[32,64], f32[8,64,64])) -> pred[] {
  %carry.1 = (s32[], f32[32,64]{1,0}, f32[8,64,64]{2,1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%carry.1), index=0
  %layers = s32[] constant(8)
  ROOT %less = pred[] compare(%n.1, %layers), direction=LT
}
ENTRY %main (a: f32[32,64], b: f32[8,64,64]) -> f32[32,64] {
  %a = f32[32,64]{1,0} parameter(0)
  %b = f32[8,64,64]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %sum = f32[32,64]{1,0} all-reduce(%a), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %tuple = (s32[], f32[32,64]{1,0}, f32[8,64,64]{2,1,0}) tuple(%start, %sum, %b)
  %loop = (s32[], f32[32,64]{1,0}, f32[8,64,64]{2,1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %out = f32[32,64]{1,0} get-tuple-element(%loop), index=1
}
%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %s = f32[] add(%l, %r)
}
"""


def test_loops_count_in_full():
    found = hlo.costs(LOOP, MESH)
    assert found.flops == 8 * 2 * 32 * 64 * 64
    piece, rows, whole = 64 * 64 * 4, 32 * 64 * 4, 256 * 64 * 4
    # The slice is read (and its number), not the stack that it is cut from.
    in_loop = (2 * piece + 4) + (piece + whole) + (rows + piece + rows)
    assert found.hbm_bytes == 8 * in_loop + 2 * rows


def test_collectives_have_axes_times_and_traffic():
    gather, reduce = hlo.costs(LOOP, MESH).collectives
    assert (gather.operation, gather.axes, gather.count, gather.group) == ("all-gather", "fsdp", 8, (0, 2, 4, 6))
    assert gather.bytes == 8 * 256 * 64 * 4 and gather.traffic == gather.bytes * 3 / 4
    assert gather.source == "a/b"
    assert (reduce.operation, reduce.axes, reduce.count) == ("all-reduce", "tensor", 1)
    assert reduce.traffic == 32 * 64 * 4 * 2 / 2


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}", [(0, 2), (1, 3)]),
        ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [(0, 2), (1, 3)]),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", [(0, 1), (1, 2), (2, 3), (3, 0)]),
        ("dimensions={0}", [(0, 1, 2, 3)]),
    ],
)
def test_groups_in_every_spelling(attributes, expected):
    assert hlo._groups(attributes, 4) == expected


def test_a_collective_beside_other_work_counts_where_it_starts():
    """Its text stands in the fusion that starts it and in those that it overlaps with, here in another loop."""
    text = """HloModule m
%start_it (p: f32[16]) -> (f32[16], f32[64]) {
  %p = f32[16]{0} parameter(0)
  %g = f32[64]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c = (f32[16]{0}, f32[64]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%go_on (q: f32[16], r: f32[64], v: f32[128]) -> (f32[128], f32[64]) {
  %q = f32[16]{0} parameter(0)
  %r = f32[64]{0} parameter(1)
  %v = f32[128]{0} parameter(2)
  %g.1 = f32[64]{0} all-gather(%q), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  %w = f32[128]{0} negate(%v)
  ROOT %t = (f32[128]{0}, f32[64]{0}) tuple(%w, %g.1)
}
%body (b: (s32[], f32[16], f32[64], f32[128])) -> (s32[], f32[16], f32[64], f32[128]) {
  %b = (s32[], f32[16]{0}, f32[64]{0}, f32[128]{0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %small = f32[16]{0} get-tuple-element(%b), index=1
  %large = f32[64]{0} get-tuple-element(%b), index=2
  %own = f32[128]{0} get-tuple-element(%b), index=3
  %f = (f32[128]{0}, f32[64]{0}) fusion(%small, %large, %own), kind=kLoop, calls=%go_on
  %h = f32[128]{0} get-tuple-element(%f), index=0
  %k = f32[64]{0} get-tuple-element(%f), index=1
  ROOT %n = (s32[], f32[16]{0}, f32[64]{0}, f32[128]{0}) tuple(%i, %small, %k, %h)
}
%cond (d: (s32[], f32[16], f32[64], f32[128])) -> pred[] {
  %d = (s32[], f32[16]{0}, f32[64]{0}, f32[128]{0}) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%j, %ten), direction=LT
}
ENTRY %main (x: f32[16], y: f32[128]) -> f32[128] {
  %x = f32[16]{0} parameter(0)
  %y = f32[128]{0} parameter(1)
  %zero = s32[] constant(0)
  %begun = (f32[16]{0}, f32[64]{0}) fusion(%x), kind=kCustom, calls=%start_it
  %a = f32[16]{0} get-tuple-element(%begun), index=0
  %z = f32[64]{0} get-tuple-element(%begun), index=1
  %in = (s32[], f32[16]{0}, f32[64]{0}, f32[128]{0}) tuple(%zero, %a, %z, %y)
  %loop = (s32[], f32[16]{0}, f32[64]{0}, f32[128]{0}) while(%in), condition=%cond, body=%body
  ROOT %out = f32[128]{0} get-tuple-element(%loop), index=3
}
"""
    found = hlo.costs(text, {"data": 4})
    (gather,) = found.collectives
    assert gather.count == 1 and gather.bytes == 64 * 4
    assert found.hbm_bytes == 10 * 2 * 128 * 4 + (16 + 64) * 4


def test_products_written_as_windows_count_no_padding():
    """A TPU's compiler turns a batch of products into a convolution whose window mostly meets padding."""
    text = """HloModule m
ENTRY %main (x: f32[4,32,16], w: f32[4,16,8]) -> f32[4,32,8] {
  %x = f32[4,32,16]{2,1,0} parameter(0)
  %w = f32[4,16,8]{2,1,0} parameter(1)
  ROOT %y = f32[4,32,8] convolution(%x, %w), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""
    assert hlo.costs(text, {"data": 1}).flops == 4 * 2 * 32 * 16 * 8


def test_the_documented_table_is_that_of_the_reports():
    docs = Path(__file__).resolve().parents[2] / "docs"
    reports = [json.loads(file.read_text()) for file in sorted((docs / "pods").glob("*.json"))]
    assert reports and summary(reports) in (docs / "pods.md").read_text()
