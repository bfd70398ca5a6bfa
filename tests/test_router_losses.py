"""Router numbers and losses: against numbers made by hand, and what leaves their gradients alone.

Shapes: N tokens, E experts, K experts per token, B batch, S sequence, L layers.
"""

import math

import pytest
import torch
from conftest import IMAGE_TOKEN
from test_routing_options import FLOAT32, MODALITIES, gradients, model_of
from torch.nn import functional as F

from moevlm.configuration_moevlm import MoeVlmConfig, MoeVlmTextConfig
from moevlm.modeling_moevlm import MoeVlmModelOutput
from moevlm.router_losses_moevlm import (
    BalanceRules,
    batch_shares,
    count_tokens,
    router_losses,
    router_statistics,
    rules_of,
)

# Router statistics, by hand


def one_hot_logits(choices, num_experts, height=30.0):
    """Logits `(N, E)` of a router that is sure of its choice: the others' probability is e^-30."""
    return F.one_hot(torch.tensor(choices), num_experts).float() * height


def statistics_of(choices, num_experts, token_mask=None):
    """Statistics of one layer with K = 1 and a sure router."""
    indices = torch.tensor(choices).unsqueeze(-1)
    return router_statistics([one_hot_logits(choices, num_experts)], [indices], token_mask)


def test_perfect_balance_scores_one():
    statistics = statistics_of([0, 1, 2, 3] * 5, 4)
    torch.testing.assert_close(statistics.balance, torch.ones(1))
    torch.testing.assert_close(statistics.load, torch.full((1, 4), 0.25))


def test_an_undecided_router_scores_one_whatever_the_choice():
    statistics = router_statistics([torch.zeros(6, 4)], [torch.zeros(6, 2, dtype=torch.long)])
    torch.testing.assert_close(statistics.balance, torch.ones(1))
    torch.testing.assert_close(statistics.entropy, torch.tensor([math.log(4)]))


@pytest.mark.parametrize("num_experts, top_k", [(4, 1), (8, 2), (6, 3)])
def test_a_collapsed_router_scores_experts_over_experts_per_token(num_experts, top_k):
    logits = torch.full((10, num_experts), -30.0)
    logits[:, :top_k] = 30.0
    statistics = router_statistics([logits], [torch.arange(top_k).expand(10, top_k)])
    torch.testing.assert_close(statistics.balance, torch.tensor([num_experts / top_k]))
    torch.testing.assert_close(statistics.load[0, :top_k], torch.full((top_k,), 1 / top_k))


def test_opposite_collapses_in_four_layers_do_not_cancel():
    logits = [one_hot_logits([expert] * 10, 4) for expert in range(4)]
    indices = [torch.full((10, 1), expert) for expert in range(4)]
    torch.testing.assert_close(router_statistics(logits, indices).balance, torch.full((4,), 4.0))


def test_padding_counts_in_no_router_number():
    real, padding = [0, 1, 1, 2], [0, 3, 3]
    mask = torch.tensor([1] * 4 + [0] * 3)
    for padded, alone in zip(statistics_of(real + padding, 4, mask), statistics_of(real, 4)):
        torch.testing.assert_close(padded, alone)


def test_padding_gets_no_gradient_from_the_router_losses():
    logits = torch.randn(6, 4, requires_grad=True)
    mask = torch.tensor([0, 0, 1, 1, 1, 1])
    statistics = router_statistics([logits], [logits.topk(2).indices], mask)
    (statistics.balance + statistics.z).sum().backward()
    assert torch.count_nonzero(logits.grad[:2]) == 0
    assert torch.count_nonzero(logits.grad[2:].abs().sum(-1)) == 4


def test_a_mask_of_nothing_gives_zeros_not_nans():
    statistics = statistics_of([0, 1], 4, torch.zeros(2))._asdict()
    assert statistics.pop("max_logit") == -math.inf  # so that the maximum over micro-batches is the true one
    assert all(torch.count_nonzero(value) == 0 for value in statistics.values())


def test_z_by_hand():
    # logsumexp(ln 1, ln 2, ln 3, ln 4) = ln 10, of four equal logits a: a + ln 4
    logits = torch.stack([torch.tensor([1.0, 2.0, 3.0, 4.0]).log(), torch.ones(4)])
    expected = (math.log(10) ** 2 + (1 + math.log(4)) ** 2) / 2
    statistics = router_statistics([logits], [logits.topk(2).indices])
    torch.testing.assert_close(statistics.z, torch.tensor([expected]))


def test_load_counts_visits_by_hand():
    indices = torch.tensor([[0, 1], [0, 2], [0, 1]])
    statistics = router_statistics([torch.randn(3, 4)], [indices])
    torch.testing.assert_close(statistics.load, torch.tensor([[3.0, 2.0, 1.0, 0.0]]) / 6)


def test_the_balance_loss_pulls_the_busy_expert_down():
    logits = torch.zeros(4, 4, requires_grad=True)
    indices = torch.tensor([[0], [0], [0], [1]])
    router_statistics([logits], [indices]).balance.sum().backward()
    per_expert = logits.grad.sum(0)
    assert per_expert[0] > per_expert[1] > per_expert[2] == per_expert[3]


# Options


def test_perfect_balance_scores_one_with_sigmoid_scores():
    logits = F.one_hot(torch.arange(20) % 4, 4).float() * 40.0 - 20.0
    statistics = router_statistics([logits], [logits.topk(1).indices], rules=BalanceRules("sigmoid"))
    torch.testing.assert_close(statistics.balance, torch.ones(1))
    torch.testing.assert_close(statistics.entropy, torch.zeros(1), atol=1e-6, rtol=0)


def test_opposite_collapses_in_four_layers_score_four_with_sigmoid_scores_too():
    logits = [F.one_hot(torch.full((10,), e), 4).float() * 40.0 - 20.0 for e in range(4)]
    statistics = router_statistics(logits, [each.topk(1).indices for each in logits], rules=BalanceRules("sigmoid"))
    torch.testing.assert_close(statistics.balance, torch.full((4,), 4.0))


def sure(choices, num_experts, allowed=None):
    """Logits and indices of a router that is sure; minus infinity outside `allowed` (N lists of experts)."""
    logits = F.one_hot(torch.tensor(choices), num_experts).float() * 30.0
    for row, experts in zip(logits, allowed or []):
        row[[e for e in range(num_experts) if e not in experts]] = -math.inf
    return [logits], [torch.tensor(choices).unsqueeze(-1)]


def test_each_modality_balanced_over_its_own_experts_scores_one():
    # Text: experts 0, 2, 3; image: 0, 1; nine text tokens and two image tokens.
    choices, image = [0, 2, 3] * 3 + [0, 1], torch.tensor([False] * 9 + [True] * 2)
    logits, indices = sure(choices, 4, [[0, 2, 3]] * 9 + [[0, 1]] * 2)
    for per_modality in (False, True):
        rules = BalanceRules(allowed=(3, 2), per_modality=per_modality)
        statistics = router_statistics(logits, indices, image_mask=image, rules=rules)
        torch.testing.assert_close(statistics.balance, torch.ones(1))
    text_only = router_statistics([logits[0][:9]], [indices[0][:9]], rules=BalanceRules(allowed=(3, 2)))
    torch.testing.assert_close(text_only.balance, torch.ones(1))


def test_a_collapsed_modality_counts_half_however_few_its_tokens():
    choices, image = [0, 1, 2, 3] * 4 + [0, 0], torch.tensor([False] * 16 + [True] * 2)
    logits, indices = sure(choices, 4)
    rules = BalanceRules(per_modality=True)
    torch.testing.assert_close(
        router_statistics(logits, indices, image_mask=image, rules=rules).balance, torch.tensor([(1.0 + 4.0) / 2])
    )
    pooled = router_statistics(logits, indices, image_mask=image).balance
    torch.testing.assert_close(pooled, router_statistics(logits, indices).balance)
    nothing = router_statistics(logits, indices, image_mask=torch.zeros_like(image), rules=rules).balance
    torch.testing.assert_close(nothing, pooled)


def test_entropy_losses_by_hand():
    # Text: two sure tokens on two experts; image: two undecided tokens.
    logits = torch.tensor([[60.0, 0, 0, 0], [0, 60.0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    image, indices = torch.tensor([False, False, True, True]), logits.topk(1).indices
    statistics = router_statistics([logits], [indices], image_mask=image)
    torch.testing.assert_close(statistics.local_entropy, torch.tensor([(0.0 + math.log(4)) / 2]))
    torch.testing.assert_close(statistics.global_entropy, torch.tensor([(math.log(4) - math.log(2) + 0.0) / 2]))
    met = router_statistics([logits], [indices], image_mask=image, rules=BalanceRules(threshold=math.log(2) - 1e-4))
    assert not met.global_entropy.any()


def test_entropy_losses_pull_tokens_to_decide_and_a_modality_to_spread():
    def entropies_after(name):
        logits = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.4, 0.1, 0.0, 0.0]], requires_grad=True)
        for _ in range(50):
            (gradient,) = torch.autograd.grad(
                getattr(router_statistics([logits], [logits.topk(1).indices]), name).sum(), logits
            )
            logits = (logits - gradient).detach().requires_grad_()
        last = router_statistics([logits], [logits.topk(1).indices])
        return last.local_entropy.item(), last.global_entropy.item()

    assert entropies_after("local_entropy")[0] < 0.7 < math.log(4) - 0.1
    assert entropies_after("global_entropy")[1] < 1e-3


HEAVY = {
    "router_aux_loss_coef": 10.0,
    "router_z_loss_coef": 1.0,
    "router_local_entropy_coef": 5.0,
    "router_global_entropy_coef": 5.0,
}
LOSSY = {
    "softmax": {},
    "sigmoid, bias": {"scoring_func": "sigmoid", "use_router_bias": True},
    "modalities": MODALITIES,
    "top p": {"router_top_p": 0.6},
}


def heavy_model(name):
    """A model whose router losses make the larger part of the routers' gradients."""
    return model_of(vision=HEAVY, connector=HEAVY, router_aux_loss_per_modality=True, **{**HEAVY, **LOSSY[name]})


def assert_router_ratios_of_one(found, expected):
    routers = [name for name in expected if name.endswith("gate.weight")]
    assert len(routers) == 4
    for name in routers:
        difference = (found[name] - expected[name]).norm() / expected[name].norm()
        assert difference.item() < 1e-5, (name, difference)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSY)
def test_accumulation_changes_no_router_gradient(batch, name, steps):
    model = heavy_model(name)
    expected, valid = gradients(model, **batch), (batch["labels"][:, 1:] != -100).sum()
    model.zero_grad()
    for _ in range(steps):
        model(**batch, num_items_in_batch=valid * steps).loss.backward()
    assert_router_ratios_of_one({n: p.grad for n, p in model.named_parameters()}, expected)


# Means over tokens, or over the tokens of each modality: what is exact for any split of any data.
MEANS = {"router_z_loss_coef": 1.0, "router_local_entropy_coef": 5.0}
MEANS |= {"router_aux_loss_coef": 0.0, "router_global_entropy_coef": 0.0}


def different_rows():
    """Four rows of different lengths, labels and modalities: the third has no picture, the fourth few labels."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(6, 64, (4, 24), generator=generator)
    mask, pictures = torch.ones_like(ids), torch.randn(4, 3, 32, 32, generator=generator)
    for row, length in enumerate((24, 11, 17, 24)):
        mask[row, length:] = 0
        if row != 2:
            ids[row, 1:5] = IMAGE_TOKEN
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE_TOKEN), -100)
    labels[3, :22] = -100
    return [
        {"input_ids": ids[[n]], "attention_mask": mask[[n]], "labels": labels[[n]], "pixel_values": pictures[[n]]}
        if n != 2
        else {"input_ids": ids[[n]], "attention_mask": mask[[n]], "labels": labels[[n]]}
        for n in range(4)
    ]


def joined(rows):
    names = ("input_ids", "attention_mask", "labels", "pixel_values")
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: torch.cat(values) for name, values in found.items() if values}


def accumulated(model, parts, **totals):
    model.zero_grad()
    for part in parts:
        model(**part, **totals).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSY)
def test_losses_that_are_means_over_tokens_are_exact_for_any_split_of_different_data(name, steps):
    model, rows = model_of(vision=MEANS, connector=MEANS, **MEANS, **LOSSY[name]), different_rows()
    whole = joined(rows)
    expected = gradients(model, **whole)
    parts = [joined(rows[n : n + 4 // steps]) for n in range(0, 4, 4 // steps)]
    tokens = sum(count_tokens(part["input_ids"], IMAGE_TOKEN, part["attention_mask"]) for part in parts)
    assert tokens.tolist() == [24 + 11 + 17 + 24 - 12, 12]
    labels = (whole["labels"][:, 1:] != -100).sum()
    found = accumulated(model, parts, num_items_in_batch=labels, num_tokens_in_batch=tokens)
    assert_router_ratios_of_one(found, expected)


def test_the_balance_loss_of_different_micro_batches_nears_that_of_the_batch_as_they_grow():
    # No bound is promised: these are the figures of docs/architecture.md.
    tokens, weight = torch.randn(8192, 16), torch.randn(8, 16) * 0.5

    def gradient(size):
        total = torch.zeros_like(weight)
        for part in tokens.split(size):
            rows = weight.clone().requires_grad_()
            logits = part @ rows.t()
            balance = router_statistics([logits], [logits.topk(2).indices]).balance.sum()
            total += torch.autograd.grad(balance * len(part) / len(tokens), rows)[0]
        return total

    whole, found = gradient(8192), [gradient(size) for size in (32, 128, 512)]
    assert [(each.norm() / whole.norm()).item() for each in found] == pytest.approx([1.06, 1.01, 1.0], abs=0.02)
    differences = [((each - whole).norm() / whole.norm()).item() for each in found]
    assert differences == pytest.approx([0.27, 0.10, 0.04], abs=0.03)


@pytest.mark.parametrize(
    "losses", [{"router_aux_loss_coef": 1.0, "router_aux_loss_per_modality": True}, {"router_global_entropy_coef": 1.0}]
)
@pytest.mark.parametrize("kinds", [None, ["image"] * 4 + ["text"] * 4])
def test_modalities_weigh_the_same_whichever_micro_batches_have_them(losses, kinds):
    fields = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, **losses, "expert_modalities": kinds}
    config = MoeVlmConfig(text_config={"num_experts": 8, "hidden_size": 16, **fields})
    weight = (torch.randn(8, 16) * 0.5).requires_grad_()
    rows = {"text": torch.randn(64, 16), "image": torch.randn(32, 16) + 0.5}

    def gradient(kinds, totals):
        states = torch.cat([rows[kind] for kind in kinds])
        image = torch.cat([torch.full((len(rows[kind]),), kind == "image") for kind in kinds])
        logits = states @ weight.t()
        outputs = MoeVlmModelOutput(
            last_hidden_state=states[None],
            router_logits=(logits,),
            router_indices=(logits.topk(2).indices,),
            router_choices=(logits.topk(2).indices,),
            image_mask=image[None] if image.any() else None,
            image_hidden_states=torch.zeros(1, int(image.sum()), 16),
            router_layers=(0, 0, 1),
        )
        return torch.autograd.grad(router_losses(config, outputs, None, totals).weighted, weight)[0]

    totals = torch.tensor([3 * 64, 32])
    whole = gradient(["text", "image", "text", "text"], totals)
    parts = [gradient(kinds, totals) for kinds in (["text", "image"], ["text"], ["text"])]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_the_rules_of_a_config_reach_its_losses(threshold):
    kinds = ["image"] * 2 + ["text"] * 6
    config = MoeVlmTextConfig(
        num_experts=8, expert_modalities=kinds, num_experts_per_tok=1, router_aux_loss_per_modality=True,
        router_global_entropy_threshold=threshold and 0.5, router_global_entropy_coef=1.0,
    )  # fmt: skip
    rules = rules_of(config)
    assert rules == BalanceRules("softmax", (6, 2), True, threshold and 0.5)
    # Each modality is decided: its entropy is 0, so it misses all of its threshold.
    logits = torch.full((4, 8), -torch.inf)
    logits[:2, 2:], logits[2:, :2] = 0.0, 0.0
    logits[:2, 2], logits[2:, 0] = 200.0, 200.0
    image = torch.tensor([False, False, True, True])
    found = router_statistics([logits], [logits.topk(1).indices], image_mask=image, rules=rules)
    wanted = [0.5, 0.5] if threshold else [math.log(6), math.log(2)]
    torch.testing.assert_close(found.modality_shortfall, torch.tensor([wanted]))
    torch.testing.assert_close(found.modality_balance, torch.tensor([[6.0, 2.0]]))


def test_shares_of_a_batch_by_hand():
    here, totals = torch.tensor([6.0, 2.0]), torch.tensor([12, 8])
    share, each = batch_shares(here, totals)
    assert share == 8 / 20 and each.tolist() == [0.25, 0.125]  # half of 6 / 12 and of 2 / 8
    share, each = batch_shares(here[:1], totals)  # a micro-batch without pictures
    torch.testing.assert_close(share, torch.tensor(6 / 20))
    assert each.tolist() == [0.25]
    share, each = batch_shares(here)
    assert share == 1.0 and each.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LOSSY)
def test_padding_and_its_side_change_no_router_gradient(batch, name, side):
    model = heavy_model(name)
    expected, numbers = gradients(model, **batch), model(**batch)
    place = (7, 0) if side == "left" else (0, 7)
    padded = {key: F.pad(batch[key], place) for key in ("input_ids", "attention_mask")}
    padded["labels"] = F.pad(batch["labels"], place, value=-100)
    padded["pixel_values"] = batch["pixel_values"]
    assert_router_ratios_of_one(gradients(model, **padded), expected)
    found = model(**padded)
    for key in ("aux_loss", "z_loss", "local_entropy_loss", "global_entropy_loss", "max_router_logit"):
        torch.testing.assert_close(found[key], numbers[key], **FLOAT32)
    for key in ("expert_counts", "expert_load_text", "expert_load_image"):
        assert all(torch.equal(*pair) for pair in zip(found[key], numbers[key])), key


@pytest.mark.parametrize("name", LOSSY)
def test_packing_changes_no_router_gradient(batch, name):
    model = heavy_model(name)
    batch.pop("attention_mask")
    expected = gradients(model, **batch)
    length = batch["input_ids"].shape[1]
    packed = {key: batch[key].reshape(1, -1) for key in ("input_ids", "labels")}
    packed["segment_ids"] = torch.tensor([[1] * length + [2] * length])
    packed["position_ids"] = torch.arange(length).repeat(1, 2)
    assert_router_ratios_of_one(gradients(model, **packed, pixel_values=batch["pixel_values"]), expected)


@pytest.mark.parametrize(
    "coefficient, number",
    [
        ("router_aux_loss_coef", "aux_loss"),
        ("router_z_loss_coef", "z_loss"),
        ("router_local_entropy_coef", "local_entropy_loss"),
        ("router_global_entropy_coef", "global_entropy_loss"),
    ],
)
def test_each_coefficient_weighs_its_own_loss(batch, coefficient, number):
    off = {name: 0.0 for name in HEAVY if name.endswith("_coef")}
    without, with_it = (
        model_of(vision={**off, **on}, connector={**off, **on}, **off, **on)
        if not on
        else model_of(vision={**off, **on}, connector={**off, **on}, **{**off, **on})
        for on in ({}, {coefficient: 1.0})
    )
    first, second = without(**batch), with_it(**batch)
    assert first[number] > 0  # reported with a coefficient of 0 too
    # One layer in the tower, one in the connector, two in the decoder: each part adds the mean of its layers.
    part_sum = second.loss - first.loss
    assert part_sum > first[number]
    if number == "aux_loss":
        assert 3.0 - 1e-3 < part_sum < 12.0


# Outputs


def test_reported_numbers_fit_together(batch):
    batch["attention_mask"][0, 20:] = 0
    output = model_of()(**batch, output_router_logits=True)
    image = (batch["input_ids"] == IMAGE_TOKEN).sum().item()
    text = batch["attention_mask"].sum().item() - image
    assert [counts.sum().item() for counts in output.expert_counts] == [64, 16, 2 * (image + text), 2 * (image + text)]
    for counts, load in zip(output.expert_counts, output.expert_load):
        torch.testing.assert_close(counts / counts.sum(), load)
    assert len(output.expert_load_text) == len(output.expert_load_image) == 2
    for whole, *parts in zip(output.expert_load[2:], output.expert_load_text, output.expert_load_image):
        torch.testing.assert_close((text * parts[0] + image * parts[1]) / (text + image), whole)
    real = batch["attention_mask"].flatten().bool()
    largest = [each.max() for each in output.router_logits[:2]] + [
        each[real].max() for each in output.router_logits[2:]
    ]
    torch.testing.assert_close(output.max_router_logit, torch.stack(largest))
    assert output.dropped_tokens.shape == output.router_entropy.shape == (4,)


def test_a_batch_without_pictures_reports_the_decoder_alone(batch):
    ids = batch["input_ids"].clone()
    ids[ids == IMAGE_TOKEN] = 7
    output = model_of(**HEAVY)(input_ids=ids, labels=ids)
    assert len(output.expert_counts) == 2 and output.max_router_logit.shape == (2,)
    assert output.get("expert_load_image") is None and output.loss.isfinite()


def test_router_numbers_stay_float32_and_finite_under_autocast(batch):
    model = heavy_model("modalities").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert output.aux_loss.dtype == output.global_entropy_loss.dtype == torch.float32
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
