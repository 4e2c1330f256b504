"""Tests, to be merged."""

from conftest import *  # noqa: F403

# ---- model

def test_rvt_weights_give_rvts_predictions(tmp_path):
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)
    torch.save(reference["checkpoint"], tmp_path / "rvt.ckpt")
    detector = load_rvt(tmp_path / "rvt.ckpt", input_hw=(128, 160), partition_split=1).eval()
    assert detector.config.fpn_depth == 0.33 and detector.config.embed_dim == 32 and detector.config.patch_size == 4
    assert sum(p.numel() for p in detector.parameters()) == reference["params"]
    state, out = None, []
    with torch.no_grad():
        for t, events in enumerate(reference["events"]):
            prediction, state = detector(events[None], state)
            means = [float(h.abs().mean()) for h in state[::2]]
            np.testing.assert_allclose(means, reference["hidden_mean_abs"][t], rtol=1e-4)
            out.append(torch.cat((prediction.box_cxcywh, prediction.obj.sigmoid()[..., None], prediction.cls.sigmoid()), -1))
    got = torch.stack([out[t][b] for t, b in reference["labelled_tb"]])
    torch.testing.assert_close(got, reference["prediction"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rvt_weights_give_rvts_losses_and_gradients(tmp_path, checkpointing):
    reference = torch.load(shared("reference/rvt_tiny.pt"), weights_only=True)
    torch.save(reference["checkpoint"], tmp_path / "rvt.ckpt")
    detector = load_rvt(tmp_path / "rvt.ckpt", input_hw=(128, 160), partition_split=1, checkpointing=checkpointing).train()
    frames = torch.zeros(4, 2, dtype=torch.bool)
    for t, b in reference["labelled_tb"]:
        frames[t, b] = True
    losses = detection_loss(detector(reference["events"], None, frames)[0], reference["labels"])
    for ours, rvt in dict(loss="loss", iou="iou_loss", obj="conf_loss", cls="cls_loss", num_fg="num_fg").items():
        assert losses[ours].item() == pytest.approx(reference["train"][rvt], rel=1e-3)
    losses["loss"].backward()
    gradients = {name: float(p.grad.norm()) for name, p in detector.named_parameters()}
    for name, norm in reference["grad_norm"].items():
        name = name.removeprefix("mdl.")
        for pattern, ours in model.RVT_NAMES:
            name = re.sub(pattern, ours, name)
        assert gradients.pop(name) == pytest.approx(norm, rel=1e-3), name
    assert not gradients


def test_rvt_b_has_its_published_size():
    detector = Detector(ModelConfig(input_hw=(360, 640), num_classes=8))
    assert sum(p.numel() for p in detector.parameters()) / 1e6 == pytest.approx(18.54, abs=0.005)


@pytest.mark.parametrize("hw, patch, padded, part, strides", [
    ((360, 640), 4, (384, 640), (6, 10), (4, 8, 16, 32)), ((360, 640), 2, (384, 640), (6, 10), (2, 4, 8, 16)),
    ((360, 640), 3, (360, 648), (5, 9), (3, 6, 12, 24)), ((240, 304), 4, (256, 320), (8, 10), (4, 8, 16, 32))])
def test_padding_partition_and_strides_follow_rvts_rule(hw, patch, padded, part, strides):
    config = ModelConfig(input_hw=hw, patch_size=patch, num_classes=2, fpn_stages=(1, 2, 3, 4)).resolved()
    assert (config.padded_hw, config.part, config.strides) == (padded, part, strides)


@pytest.mark.parametrize("mode, want", [("window", {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}),
                                        ("grid", {(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)})])
def test_attention_joins_neighbours_or_a_grid(mode, want):
    torch.manual_seed(0)
    block, x = model.PartitionAttention(8, 4, (2, 3), mode, True).double(), torch.randn(1, 4, 6, 8, dtype=torch.double)
    changed = x.clone()
    changed[0, 0, 0, 0] += 1
    moved = (block(x) != block(changed)).any(-1)[0].nonzero().tolist()
    assert {tuple(place) for place in moved} == want


def test_lstm_cell_by_hand():
    cell = model.LSTMCell(1)
    weight = torch.tensor([[0.1, 0.2], [0.3, -0.4], [0.5, 0.6], [-0.7, 0.8]])  # forget, input, output, cell; x then h
    cell.load_state_dict({"gates.weight": weight, "gates.bias": torch.tensor([0.01, 0.02, 0.03, 0.04])})
    h, c = cell(*[torch.full((1, 1, 1, 1), value) for value in (2.0, -1.0, 0.5)])
    f, i, o = (1 / (1 + math.exp(-z)) for z in (0.2 - 0.2 + 0.01, 0.6 + 0.4 + 0.02, 1.0 - 0.6 + 0.03))
    want = f * 0.5 + i * math.tanh(-1.4 - 0.8 + 0.04)
    assert float(c.detach()) == pytest.approx(want, rel=1e-5)
    assert float(h.detach()) == pytest.approx(o * math.tanh(want), rel=1e-5)


def test_decoding_by_hand():
    detector = tiny_detector()
    for head in detector.heads:
        for pred in (head.reg_pred, head.obj_pred, head.cls_pred):
            torch.nn.init.zeros_(pred.weight)
        head.reg_pred.bias.data = torch.tensor([0.25, -0.5, math.log(2), math.log(3)])
    prediction, _ = detector(random_events(1, 1, 20, 48, 64))
    A = 8 * 8 + 4 * 4 + 2 * 2  # 48x64 is padded to 64x64; strides 8, 16, 32
    assert prediction.box_cxcywh.shape == (1, A, 4) and prediction.grid[8 * 8 + 5].tolist() == [1, 1, 16]
    torch.testing.assert_close(prediction.box_cxcywh[0, 8 * 8 + 5], torch.tensor([20.0, 8.0, 32.0, 48.0]))
    assert float(prediction.obj[0, 0].detach().sigmoid()) == pytest.approx(0.01, rel=1e-4)


VARIANTS = [dict(), dict(patch_size=3, fpn_stages=(1, 2, 3, 4)), dict(patch_size=2, fpn_stages=(1, 2)),
            dict(small_object_attention=True), dict(small_object_attention=True, attention_spatial=False),
            dict(small_object_attention=True, attention_temporal=False)]


@pytest.mark.parametrize("changes", VARIANTS)
def test_frame_by_frame_equals_chunks(changes):
    detector, events = tiny_detector(**changes), random_events(5, 2, 20, 48, 64)
    with torch.no_grad():
        whole, last = detector(events)
        state, parts = None, []
        for chunk in (events[:1], events[1:4], events[4:]):
            prediction, state = detector(chunk, state)
            parts.append(prediction)
    for i in range(3):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), whole[i], rtol=1e-4, atol=1e-4)
    for a, b in zip(state, last):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS)
def test_streams_do_not_see_each_other(changes):
    detector, events = tiny_detector(**changes), random_events(3, 3, 20, 48, 64)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        prediction, state = detector(events)
        permuted, permuted_state = detector(events[:, order])
        alone, alone_state = detector(events[:, 1:2])
        other = events.clone()
        other[:, [0, 2]] = random_events(3, 2, 20, 48, 64, seed=1)
        beside, beside_state = detector(other)
    for i in range(3):
        rows = prediction[i].unflatten(0, (3, 3))
        torch.testing.assert_close(permuted[i].unflatten(0, (3, 3)), rows[:, order], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone[i], rows[:, 1], rtol=1e-4, atol=1e-4)
        assert torch.equal(beside[i].unflatten(0, (3, 3))[:, 1], rows[:, 1])  # same shapes, so bit for bit
    for a, b, c, d in zip(state, permuted_state, alone_state, beside_state):
        torch.testing.assert_close(b, a[order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(c[0], a[1], rtol=1e-4, atol=1e-5)
        assert torch.equal(d[1], a[1])


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_reset_row_starts_afresh_even_from_nan(changes):
    detector, events = tiny_detector(**changes), random_events(4, 2, 20, 48, 64)
    with torch.no_grad():
        _, state = detector(events[:2])
        for s in state:
            s[1] = math.nan
        state = reset_state(state, torch.tensor([False, True]))
        prediction, after = detector(events[2:], state)
        start = [s.clone() for s in state]
        for s in start:
            s[1] = 0
        fresh, fresh_after = detector(events[2:], start)
    for a, b in zip((*prediction, *after), (*fresh, *fresh_after)):
        assert torch.equal(a, b)
    assert all(float(s[1].abs().sum()) == 0 for s in state) and any(float(s[0].abs().sum()) for s in state)


def test_chosen_frames_equal_those_of_all_frames():
    detector, events = tiny_detector(), random_events(4, 2, 20, 48, 64)
    frames = torch.tensor([[0, 1], [0, 0], [1, 1], [0, 0]], dtype=torch.bool)
    with torch.no_grad():
        every, state = detector(events)
        some, same = detector(events, None, frames)
    torch.testing.assert_close(some.box_cxcywh, every.box_cxcywh[[1, 4, 5]], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(state, same))


@pytest.mark.parametrize("patch, stages, hw", [
    (patch, stages, hw) for patch in (2, 3, 4) for stages, hw in
    (((1, 2), (37, 50)), ((2, 3), (61, 33)), ((2, 3, 4), (90, 70)), ((1, 2, 3, 4), (45, 80)))])
def test_every_patch_size_works_with_every_pyramid_at_odd_sizes(patch, stages, hw):
    detector = tiny_detector(input_hw=hw, patch_size=patch, fpn_stages=stages)
    prediction, state = detector(random_events(1, 2, 20, *hw))
    H, W = detector.config.padded_hw
    A = sum(H // s * (W // s) for s in detector.config.strides)
    assert detector.config.strides == tuple(patch * 2 ** (k - 1) for k in stages)
    assert prediction.box_cxcywh.shape == (2, A, 4) and prediction.cls.shape == (2, A, 3)
    assert len(detector.stages) == stages[-1] and all(s.shape[0] == 2 for s in state)


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_parameter_gets_a_gradient(changes):
    detector = tiny_detector(embed_dim=64, **changes).train()
    prediction, _ = detector(random_events(3, 2, 20, 48, 64))
    sum(field.square().sum() for field in prediction[:3]).backward()
    dead = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


def test_attention_off_is_bit_identical_to_no_attention():
    plain, off = tiny_detector(), tiny_detector(attention_spatial=False, attention_temporal=False)
    assert plain.state_dict().keys() == off.state_dict().keys() and not any("attention." in k[:10] for k in off.state_dict())
    events = random_events(2, 1, 20, 48, 64)
    for a, b in zip(plain(events)[0], off(events)[0]):
        assert torch.equal(a, b)


def test_spatial_attention_adds_at_most_the_input_and_channels_start_higher_at_small_strides():
    x = torch.rand(2, 12, 8, 8)
    y = model.MultiScaleSpatialAttention(12)(x)
    assert bool(((y >= x) & (y <= 2 * x)).all()) and not torch.equal(x, y)
    fine, coarse = model.ScaleAwareChannelAttention(64, 8), model.ScaleAwareChannelAttention(64, 16)
    assert fine.fc[0].out_features == 4 and coarse.fc[0].out_features == 8
    assert float((fine(x.new_ones(1, 64, 4, 4))).mean()) > float((coarse(x.new_ones(1, 64, 4, 4))).mean())


def test_temporal_attention_is_causal():
    module, x = model.EventTemporalAttention(8).eval(), torch.rand(4, 2, 8, 6, 6)
    past = torch.zeros(2, 2, 8, 6, 6)
    y, following = module(x, past)
    changed = x.clone()
    changed[2:] += 1
    assert torch.equal(module(changed, past)[0][:2], y[:2]) and not torch.equal(module(changed, past)[0][2], y[2])
    assert torch.equal(following, x[2:].transpose(0, 1))


@pytest.mark.parametrize("changes", [dict(), dict(fpn_stages=(1, 2, 3, 4), small_object_attention=True)])
def test_recomputation_changes_memory_only(changes):
    events, kept = random_events(3, 2, 20, 48, 64), []
    targets = torch.tensor([[[1.0, 30, 20, 16, 16], [2.0, 10, 30, 6, 8]]]).repeat(6, 1, 1)
    runs = []
    for checkpointing in (False, True):
        detector, size = tiny_detector(checkpointing=checkpointing, **changes).train(), {}

        def pack(x):
            if not isinstance(x, torch.nn.Parameter):
                size[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = detection_loss(detector(events)[0], targets)["loss"]
        kept.append(sum(size.values()))
        result.backward()
        runs.append((result.detach(), [p.grad for p in detector.parameters()], list(detector.buffers())))
    (a, gradients, statistics), (b, again, statistics_again) = runs
    torch.testing.assert_close(a, b)
    for x, y in zip(gradients, again):
        assert float((x - y).norm()) <= 1e-3 * float(x.norm()) + 1e-6
    for x, y in zip(statistics, statistics_again):  # moved once, not twice
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("changes", [dict(), dict(checkpointing=True), dict(small_object_attention=True)])
def test_forward_and_loss_are_one_graph_that_does_not_recompile(changes):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    module = train.Forward(tiny_detector(**changes).train(), SizeAware(True, 2.0, 256, 1024, "exponential", ("iou", "cls")))
    plain, compiled = copy.deepcopy(module), torch.compile(module, backend=counter, fullgraph=True)
    events, state = random_events(3, 2, 20, 48, 64), module.model.initial_state(2)
    for N, M in ((2, 16), (4, 16), (6, 32), (3, 16)):
        index, targets = torch.randperm(6)[:N].sort().values, torch.zeros(N, M, 5)
        targets[:, 0] = torch.tensor([1.0, 30, 20, 16, 16])
        torch._dynamo.maybe_mark_dynamic(index, 0)
        torch._dynamo.maybe_mark_dynamic(targets, 0)
        torch._dynamo.maybe_mark_dynamic(targets, 1)
        got, _ = compiled(events, state, index, targets)
        want, _ = plain(events, state, index, targets)
        torch.testing.assert_close(got["loss"], want["loss"])
    assert counter.frame_count == 1


def test_model_config_names_what_cannot_work():
    for changes, word in ((dict(fpn_stages=(2, 4)), "fpn_stages"), (dict(fpn_stages=(3, 2)), "fpn_stages"),
                          (dict(fpn_stages=(4,)), "fpn_stages"), (dict(patch_size=5), "patch_size"),
                          (dict(embed_dim=20), "embed_dim"), (dict(dim_head=24), "dim_head"),
                          (dict(partition_split=-1), "partition_split"), (dict(partition_split=100), "partition_split")):
        with pytest.raises(ValueError, match=word):
            ModelConfig(**changes)
    with pytest.raises(ValueError, match="48x64.*|built for"):
        tiny_detector()(random_events(1, 1, 20, 40, 64))


