"""Tests, to be merged."""

from conftest import *  # noqa: F403

# ---- loss

def test_size_weights_by_hand():
    def weights(kind, *areas):
        return size_weights(torch.tensor(areas), kind, 2.5, 1024, 9216).tolist()

    assert weights("exponential", 256.0, 1024.0, 4096.0) == pytest.approx([2.5 * math.exp(-0.25), 1, 1], rel=1e-6)
    assert weights("exponential", 256.0)[0] == pytest.approx(1.947, abs=5e-4)
    assert weights("linear", 512.0, 1024.0, 5120.0, 9216.0, 20000.0) == pytest.approx([2.5, 2.5, 1.75, 1, 1])
    assert weights("step", 512.0, 1024.0, 1025.0, 9216.0, 9217.0) == pytest.approx([2.5, 2.5, 1.75, 1.75, 1])
    assert size_weights(torch.zeros(0), "exponential", 2.5, 1024, 9216).shape == (0,)
    below = size_weights(torch.tensor([26.0 ** 2, 27.0 ** 2]), "exponential", 2.0, 1024, 9216)  # 2.0 acts below 27x27
    assert below[0] > 1 and below[1] == 1
    with pytest.raises(ValueError, match="exponential, linear or step"):
        size_weights(torch.zeros(1), "cubic", 2, 1, 2)


def test_focal_loss_by_hand():
    p = torch.tensor([0.9, 0.2])
    got = loss.focal_loss(p.logit(), torch.tensor([1.0, 0.0]))
    assert got.tolist() == pytest.approx([0.25 * 0.01 * -math.log(0.9), 0.75 * 0.04 * -math.log(0.8)], rel=1e-4)


def slow_simota(box, obj, cls, grid, targets):
    """The definition, one image, box and anchor after the other: {anchor: (box, IoU)} of one frame."""
    def overlap(a, b):
        width = min(a[0] + a[2] / 2, b[0] + b[2] / 2) - max(a[0] - a[2] / 2, b[0] - b[2] / 2)
        height = min(a[1] + a[3] / 2, b[1] + b[3] / 2) - max(a[1] - a[3] / 2, b[1] - b[3] / 2)
        inter = max(width, 0) * max(height, 0)
        return inter / (a[2] * a[3] + b[2] * b[3] - inter)

    boxes = [(int(c), tuple(b)) for c, *b in targets.tolist() if b[2] > 0]
    near = {a: {m for m, (_, b) in enumerate(boxes) if abs((gx + 0.5) * s - b[0]) < 1.5 * s and abs((gy + 0.5) * s - b[1]) < 1.5 * s}
            for a, (gx, gy, s) in enumerate(grid.tolist())}
    candidates = [a for a in near if near[a]]
    cost, iou = {}, {}
    for m, (c, b) in enumerate(boxes):
        for a in candidates:
            p = [math.sqrt(1 / (1 + math.exp(-float(obj[a]))) / (1 + math.exp(-float(z)))) for z in cls[a]]
            entropy = -sum(math.log(q if k == c else 1 - q) for k, q in enumerate(p))
            iou[m, a] = overlap(b, box[a].tolist())
            cost[m, a] = entropy - 3 * math.log(iou[m, a] + 1e-8) + (0 if m in near[a] else 1e6)
    claims = {a: [] for a in candidates}
    for m in range(len(boxes)):
        k = max(1, int(sum(sorted((iou[m, a] for a in candidates), reverse=True)[:10])))
        for a in sorted(candidates, key=lambda a: cost[m, a])[:k]:
            claims[a].append(m)
    matched = {}
    for a, who in claims.items():
        if who:
            m = who[0] if len(who) == 1 else min(range(len(boxes)), key=lambda m: cost[m, a])
            matched[a] = (m, iou[m, a])
    return matched


@pytest.mark.parametrize("seed", range(8))
def test_simota_equals_its_slow_definition(seed):
    g = torch.Generator().manual_seed(seed)
    grid = torch.cat([torch.cartesian_prod(torch.arange(64 // s), torch.arange(96 // s)).flip(1).float() for s in (8, 16, 32)])
    grid = torch.cat((grid, torch.cat([torch.full((64 // s * (96 // s), 1), float(s)) for s in (8, 16, 32)])), 1)
    A, K = len(grid), 3
    rows = [[[0, 16.0, 24, 20, 12], [1, 16.0, 24, 10, 30], [2, 40, 32, 8, 8], [1, 90, 60, 30, 30]],  # borders, one centre
            [[2, -3.0, 10, 20, 20], [0, 95, 63, 12, 12], [1, 20, 64, 10, 10], [0, 0, 0, 0, 0]],  # outside, padding
            [[1, 33.3, 41.7, 25, 9]] + [[0.0] * 5] * 3, [[0.0] * 5] * 4]  # one box, none
    rand = torch.rand(4, 4, 5, generator=g) * torch.tensor([2.99, 96, 64, 40, 40]) + torch.tensor([0, 0, 0, 4, 4])
    rand[..., 0] = rand[..., 0].floor()
    targets = torch.cat((torch.tensor(rows, dtype=torch.float), rand))
    N = len(targets)
    centre = (grid[:, :2] + 0.5) * grid[:, 2:] + torch.randn(N, A, 2, generator=g) * 4
    size = grid[:, 2:] * torch.rand(N, A, 2, generator=g).add(0.5) * 1.5
    prediction = Prediction(torch.cat((centre, size), -1), torch.randn(N, A, generator=g), torch.randn(N, A, K, generator=g), grid)
    found = assign(prediction, targets)
    for n in range(N):
        want = slow_simota(*[field[n] for field in prediction[:3]], grid, targets[n])
        got = {int(a): (int(m), float(i)) for a, m, i, yes in
               zip(found.anchor[n], found.box[n], found.iou[n], found.matched[n]) if yes}
        assert got.keys() == want.keys()
        for a, (m, iou) in want.items():
            assert got[a][0] == m and got[a][1] == pytest.approx(iou, rel=1e-4, abs=1e-6)


def toy_prediction(N=2, K=3, seed=0):
    g, detector = torch.Generator().manual_seed(seed), tiny_detector()
    A = len(detector.grid)
    box = torch.cat(((detector.grid[:, :2] + 0.5) * detector.grid[:, 2:], detector.grid[:, 2:].repeat(1, 2)), 1)
    box = box.repeat(N, 1, 1) + torch.rand(N, A, 4, generator=g)
    return Prediction(box.requires_grad_(), torch.randn(N, A, generator=g).requires_grad_(),
                      torch.randn(N, A, K, generator=g).requires_grad_(), detector.grid)


def test_loss_terms_equal_their_formulas_written_out():
    prediction = toy_prediction()
    targets = torch.tensor([[[0, 20.0, 20, 12, 14], [2, 44, 30, 20, 9]], [[1, 12, 40, 8, 8], [0, 0, 0, 0, 0]]])
    aware = SizeAware("exponential", 2.5, 256, 1024, ("iou", "cls"))
    got, weighted = detection_loss(prediction, targets), detection_loss(prediction, targets, aware)
    want = dict.fromkeys(("iou", "cls", "iou_w", "cls_w"), 0.0)
    F_, positive = 0, torch.zeros_like(prediction.obj)
    for n in range(2):
        matched = slow_simota(*[field[n].detach() for field in prediction[:3]], prediction.grid, targets[n])
        for a, (m, iou) in matched.items():
            weight = float(size_weights(targets[n, m, 3] * targets[n, m, 4], *aware[:4]))
            onehot = F.one_hot(targets[n, m, 0].long(), 3).float()
            want["iou"] += 5 * (1 - iou ** 2)
            want["iou_w"] += 5 * weight * (1 - iou ** 2)
            want["cls"] += float(F.binary_cross_entropy_with_logits(prediction.cls[n, a], onehot * iou, reduction="sum"))
            want["cls_w"] += weight * float(loss.focal_loss(prediction.cls[n, a], onehot).sum())
            positive[n, a] = 1
        F_ += len(matched)
    obj = float(F.binary_cross_entropy_with_logits(prediction.obj, positive, reduction="sum")) / F_
    assert float(got["iou"]) == pytest.approx(want["iou"] / F_, rel=1e-5)
    assert float(got["cls"]) == pytest.approx(want["cls"] / F_, rel=1e-5)
    assert float(got["obj"]) == pytest.approx(obj, rel=1e-5) and float(got["num_fg"]) == pytest.approx(F_ / 3)
    assert float(got["loss"]) == pytest.approx((want["iou"] + want["cls"]) / F_ + obj, rel=1e-5)
    assert float(weighted["iou"]) == pytest.approx(want["iou_w"] / F_, rel=1e-5)
    assert float(weighted["cls"]) == pytest.approx(want["cls_w"] / F_, rel=1e-5)
    only = detection_loss(prediction, targets, aware._replace(size_aware_terms=("iou",)))
    assert torch.equal(only["cls"], got["cls"]) and torch.equal(only["iou"], weighted["iou"])


def test_a_weight_of_one_is_the_plain_loss():
    prediction, targets = toy_prediction(), torch.tensor([[[0, 20.0, 20, 12, 14]], [[1, 12, 40, 8, 8]]])
    for kind in ("exponential", "linear", "step"):
        one = detection_loss(prediction, targets, SizeAware(kind, 1.0, 1024, 9216, ("iou",)))
        for key, value in detection_loss(prediction, targets).items():
            assert torch.equal(one[key], value)


@pytest.mark.parametrize("M", [0, 4])
def test_targets_without_boxes_train_the_objectness_only(M):
    prediction = toy_prediction()
    losses = detection_loss(prediction, torch.zeros(2, M, 5), SizeAware("linear", 2.0, 256, 1024, ("iou", "cls")))
    losses["loss"].backward()
    assert losses["iou"] == losses["cls"] == 0 and losses["obj"].isfinite() and losses["num_fg"] == 1
    assert prediction.obj.grad.abs().sum() > 0 and prediction.box_cxcywh.grad.abs().sum() == 0


def test_padding_and_frame_order_do_not_change_the_loss():
    prediction, targets = toy_prediction(), torch.tensor([[[0, 20.0, 20, 12, 14]], [[1, 12, 40, 8, 8]]])
    padded = detection_loss(prediction, F.pad(targets, (0, 0, 0, 15)))["loss"]
    swapped = detection_loss(Prediction(*[field.flip(0) for field in prediction[:3]], prediction.grid), targets.flip(0))["loss"]
    torch.testing.assert_close(padded, detection_loss(prediction, targets)["loss"])
    torch.testing.assert_close(swapped, detection_loss(prediction, targets)["loss"])


