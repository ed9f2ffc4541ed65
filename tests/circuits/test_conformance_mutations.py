"""The conformance kit is able to fail: mistakes put into the library on purpose are caught, and shown as code."""

import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import circuits as ct
from circuits import learning, precision
from circuits.algebra import logspace
from circuits.algebra.semirings import LogSemiring, MaxSemiring
from circuits.engine.question import Question
from circuits.engine.weights import Weights
from circuits.learning import em
from circuits.testing.conformance import _cases, _learning

NOT_RAISED = pytest.fail.Exception


class SmallHMM(ct.testing.StructureTestCase):
    """Not collected by pytest, but for what its laws say about a broken library."""

    def circuit(self, draw):
        sizes = [draw(st.integers(1, largest)) for largest in (3, 2, 3)]
        return ct.structures.hmm(*sizes, homogeneous=draw(st.booleans()))


def falsify(test_case, law):
    """Try a law on twenty cases and stop at the first failure, without shrinking it."""

    @settings(max_examples=20, phases=[Phase.generate], database=None, derandomize=True, report_multiple_bugs=False)
    @given(test_case().cases())
    def tried(case):
        getattr(test_case, law).law(test_case(), case)

    tried()


def replaced(monkeypatch, place, name, mutated):
    """Replace a function by one that is given the original and its arguments."""
    original = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **options: mutated(original, *args, **options))


def wrong_sign(patch):
    replaced(patch, ct.queries, "log_partition", lambda true, pc, evidence: -true(pc, evidence))


def conditional_that_forgets_to_divide(patch):
    patch.setattr(ct.queries, "log_conditional", lambda pc, x, observed: ct.queries.log_likelihood(pc, x))


def marginal_of_the_unobserved(patch):
    replaced(patch, ct.queries, "log_marginal", lambda true, pc, x, observed: true(pc, x, ~observed))


def dropped_weight(patch):
    def contract(true, self, log_weights, x, *, weights=None):
        weights = log_weights.exp() if weights is None else weights
        keep = torch.ones_like(weights)
        keep[..., -1] = 0.5
        return true(self, log_weights + keep.log(), x, weights=weights * keep)

    replaced(patch, LogSemiring, "contract", contract)
    replaced(patch, ct.CompiledCircuit, "log_partition", lambda true, *args: torch.no_grad()(true)(*args))


def missing_normalisation(patch):
    def own_weights(self):
        return {name: Weights(parameter) for name, parameter in self.bank.items()}

    patch.setattr(ct.CompiledCircuit, "own_weights", own_weights)


def off_by_one_in_sampling(patch):
    def choose(true, self, scores, generator):
        return (true(self, scores, generator) + 1) % scores.shape[1]

    replaced(patch, LogSemiring, "choose", choose)


def sampling_that_ignores_weights(patch):
    def choose(true, self, scores, generator):
        return true(self, torch.where(scores > -torch.inf, 0.0, scores), generator)

    replaced(patch, LogSemiring, "choose", choose)


def sampling_that_ignores_the_generator(patch):
    replaced(patch, LogSemiring, "choose", lambda true, self, scores, generator: true(self, scores, None))


def mpe_takes_the_least(patch):
    patch.setattr(MaxSemiring, "choose", lambda self, scores, generator: scores.argmin(-1))


def marginals_of_impossible_evidence(patch):
    def marginals(true, pc, evidence):
        possible = pc.log_partition(evidence) > -torch.inf
        return true(pc, evidence) if bool(possible.all()) else torch.full((len(possible), 1, 1), torch.nan)

    replaced(patch, ct.queries, "marginals", marginals)


def gradient_that_is_off_by_a_percent(patch):
    def contract_adjoint(true, *args):
        grad_x, scale = true(*args)
        return 1.01 * grad_x, scale

    replaced(patch, logspace, "contract_adjoint", contract_adjoint)


def second_derivative_without_weights(patch):
    replaced(patch, logspace, "contract_plain", lambda true, log_weights, x: true(log_weights.detach(), x))


def underflow_that_is_not_repaired(patch):
    def repair(true, out, total, log_weights, x):
        out.masked_fill_(total == 0, -torch.inf)
        return []

    replaced(patch, logspace, "_repair", repair)


def flows_that_count_half(patch):
    def expected_flows(true, *args):
        flows, log_likelihood = true(*args)
        return learning.ExpectedFlows({name: flow / 2 for name, flow in flows.items()}, log_likelihood)

    replaced(patch, learning, "expected_flows", expected_flows)


def flows_that_ignore_sample_weights(patch):
    replaced(patch, learning, "expected_flows", lambda true, pc, evidence, counts=None: true(pc, evidence))


def em_with_a_wrong_denominator(patch):
    def maximise(true, flows, log_weights, axis, pseudocount):
        log_maximised, is_reached = true(flows, log_weights, axis, pseudocount)
        total = flows.sum(axis, keepdim=True)
        return log_maximised + ((total + pseudocount) / (total + pseudocount + 1)).log(), is_reached

    replaced(patch, em, "_maximise", maximise)


def em_that_walks_away_from_the_data(patch):
    def em_step(true, pc, flows, **options):
        return true(pc, {name: 1 / (flow + 0.01) for name, flow in flows.items()}, **options)

    replaced(patch, learning, "em_step", em_step)


def adam_that_diverges(patch):
    def fit(true, pc, data, **options):
        result = true(pc, data, **options)
        with torch.no_grad():
            next(iter(pc.bank.values())).fill_(torch.nan)
        return result

    replaced(patch, _learning.learning, "fit", fit)


def saving_in_single_precision(patch):
    replaced(patch, _cases, "load", lambda true, path: true(path).float().double())


def random_weights_without_a_seed(patch):
    replaced(patch, ct.CompiledCircuit, "randomize", lambda true, self, **options: true(self))


def listed_evidence_without_factors(patch):
    def log_mix(true, log_table, values, log_factors, *, table=None):
        return true(log_table, values, torch.zeros_like(log_factors), table=table)

    replaced(patch, logspace, "log_mix", log_mix)


def weights_that_are_read_once(patch):
    def kept(true, self, name, parameter):
        if name not in self._cache:
            self._cache[name] = (parameter.detach().clone(), self._read_weights(name, parameter.detach()))
        return self._cache[name][1] if not torch.is_grad_enabled() else true(self, name, parameter)

    replaced(patch, ct.CompiledCircuit, "_bank_weights", kept)


def passes_in_the_callers_precision(patch):
    patch.setattr(precision, "_DEVICES", ())


def flows_below_what_nobody_observed(patch):
    patch.setattr(Question, "silenced", lambda self: self)


MUTATIONS = {
    wrong_sign: "test_the_partition_function_is_the_sum_over_all_assignments",
    conditional_that_forgets_to_divide: "test_the_conditional_is_the_joint_over_the_marginal",
    marginal_of_the_unobserved: "test_the_marginal_sums_out_what_is_not_observed",
    dropped_weight: "test_probabilities_sum_to_one",
    missing_normalisation: "test_probabilities_sum_to_one",
    off_by_one_in_sampling: "test_samples_follow_the_joint",
    sampling_that_ignores_weights: "test_samples_follow_the_posterior",
    sampling_that_ignores_the_generator: "test_the_same_seed_draws_the_same_samples",
    mpe_takes_the_least: "test_the_mpe_is_the_best_explanation",
    marginals_of_impossible_evidence: "test_impossible_evidence_is_minus_infinity_or_refused",
    gradient_that_is_off_by_a_percent: "test_gradients_are_those_of_the_enumerated_sum",
    second_derivative_without_weights: "test_second_derivatives_pass_gradgradcheck",
    underflow_that_is_not_repaired: "test_extreme_weights_give_exact_values_and_finite_gradients",
    flows_that_count_half: "test_expected_flows_are_posterior_counts",
    flows_that_ignore_sample_weights: "test_samples_count_as_often_as_their_weights_say",
    em_with_a_wrong_denominator: "test_an_em_step_mixes_old_weights_with_posterior_shares",
    em_that_walks_away_from_the_data: "test_em_never_lowers_the_likelihood",
    adam_that_diverges: "test_adam_keeps_a_distribution",
    saving_in_single_precision: "test_saving_and_loading_keeps_every_bit",
    random_weights_without_a_seed: "test_the_same_seed_gives_the_same_weights",
    listed_evidence_without_factors: "test_all_forms_of_evidence_say_the_same",
    weights_that_are_read_once: "test_every_write_to_the_weights_is_seen",
    passes_in_the_callers_precision: "test_autocast_changes_no_answer",
    flows_below_what_nobody_observed: "test_a_row_that_says_nothing_teaches_nothing",
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mistake_in_the_library_is_caught_by_its_law(mutation, monkeypatch):
    falsify(SmallHMM, MUTATIONS[mutation])  # which passes as long as nothing is broken
    mutation(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, ValueError, NOT_RAISED)):
        falsify(SmallHMM, MUTATIONS[mutation])


FURTHER_QUERIES = [
    ("pairwise_marginals", "test_pairwise_marginals_are_enumerated_ones"),
    ("mutual_information", "test_mutual_information_is_that_of_the_enumerated_pairs"),
    ("mean", "test_moments_are_enumerated_averages"),
    ("variance", "test_moments_are_enumerated_averages"),
    ("covariance", "test_moments_are_enumerated_averages"),
    ("expectation", "test_expectations_are_enumerated_averages"),
    ("log_cdf", "test_the_cumulative_distribution_is_the_sum_below"),
    ("latent_entropy", "test_the_latent_entropy_is_that_of_all_explanations"),
    ("entropy_bounds", "test_the_entropy_lies_between_its_bounds"),
    ("entropy", "test_the_entropy_lies_between_its_bounds"),
    ("k_best", "test_the_best_explanations_come_first"),
    ("sample_without_replacement", "test_samples_without_replacement_are_distinct"),
    ("log_inner_product", "test_inner_products_are_enumerated_sums"),
    ("cauchy_schwarz_divergence", "test_inner_products_are_enumerated_sums"),
    ("cross_entropy", "test_divergences_are_enumerated_sums"),
    ("kl_divergence", "test_divergences_are_enumerated_sums"),
    ("renyi_divergence", "test_divergences_are_enumerated_sums"),
    ("automaton_log_probability", "test_the_probability_of_acceptance_is_the_sum_over_accepted_assignments"),
    ("order_log_probability", "test_the_probability_of_an_order_is_the_sum_over_ordered_assignments"),
]


class Independent(ct.testing.StructureTestCase):
    """A deterministic chain, which all queries answer on."""

    def circuit(self, draw):
        return ct.structures.fully_factorized(2, 3)


@pytest.mark.parametrize(("query", "law"), FURTHER_QUERIES)
def test_a_wrong_answer_is_caught_by_the_law_of_its_query(query, law, monkeypatch):
    def slightly_wrong(true, *args, **options):
        found = true(*args, **options)
        if isinstance(found, torch.Tensor):
            return 1.01 * found + 0.01
        return type(found)(*(part + 1 if part.is_floating_point() else part for part in found))

    falsify(Independent, law)
    replaced(monkeypatch, ct.queries, query, slightly_wrong)
    with pytest.raises(AssertionError):
        falsify(Independent, law)


class SmallClasses(ct.testing.ClassStructureTestCase):
    """Not collected by pytest, as those above."""

    def circuit(self, draw):
        return ct.structures.rat_spn(3, 1, 1, 2, 2, num_classes=draw(st.integers(1, 3)), seed=0)


TRANSFORMS = [
    ("condition", "test_conditioning_renormalises_the_joint"),
    ("marginalize", "test_marginalizing_sums_out"),
    ("permute", "test_permuting_renames_variables"),
    ("grow", "test_other_circuits_of_the_same_distribution"),
    ("trim", "test_other_circuits_of_the_same_distribution"),
    ("merge_equal_units", "test_other_circuits_of_the_same_distribution"),
    ("untie_parameters", "test_other_circuits_of_the_same_distribution"),
    ("prune", "test_pruning_loses_at_most_its_bound"),
    ("multiply", "test_the_product_of_two_circuits_multiplies_their_tables"),
]


@pytest.mark.parametrize("test_case", [SmallHMM, SmallClasses])
@pytest.mark.parametrize(("transform", "law"), TRANSFORMS)
def test_a_wrong_circuit_is_caught_by_the_law_of_its_transformation(test_case, transform, law, monkeypatch):
    def other_weights(true, *args, **options):
        found = true(*args, **options)
        (found if isinstance(found, ct.CompiledCircuit) else found.pc).randomize(seed=99)
        return found

    falsify(test_case, law)
    replaced(monkeypatch, ct.transforms, transform, other_weights)
    with pytest.raises(AssertionError):
        falsify(test_case, law)


CLASS_QUERIES = [
    (ct.queries, "log_partition", "test_the_partition_function_is_one_per_class"),
    (ct.queries, "class_posterior", "test_the_posterior_of_the_class_is_bayes_rule"),
    (ct.queries, "marginals", "test_evidence_that_names_the_class_asks_that_class"),
    (ct.queries, "mpe", "test_evidence_that_names_the_class_asks_that_class"),
    (ct.queries, "sample", "test_evidence_with_a_prior_asks_the_mixture"),
    (ct.CompiledCircuit, "forward", "test_every_class_has_its_own_distribution"),
    (learning, "expected_flows", "test_em_never_lowers_the_likelihood_of_the_samples_classes"),
]


@pytest.mark.parametrize(("place", "query", "law"), CLASS_QUERIES)
def test_a_mistake_about_classes_is_caught_by_its_law(place, query, law, monkeypatch):
    calls = []

    def wrong(true, *args, **options):
        calls.append(query)
        found = true(*args, **options)
        if isinstance(found, torch.Tensor):
            return found.roll(1, 0) * 1.01 + 0.01 if found.is_floating_point() else torch.zeros_like(found)
        return found._replace(**{found._fields[1]: found[1] - len(calls)})

    falsify(SmallClasses, law)
    replaced(monkeypatch, place, query, wrong)
    with pytest.raises(AssertionError):
        falsify(SmallClasses, law)


def test_a_failing_case_is_printed_as_code_that_rebuilds_it(monkeypatch):
    class Anything(ct.testing.StructureTestCase):
        max_examples = 20

        def circuit(self, draw):
            return draw(ct.testing.circuits(max_vars=3, max_units=2))

    def marginals(true, pc, evidence):
        found = true(pc, evidence)
        return found.flip(2) if found.shape[2] > 1 and evidence.values is None else found

    replaced(monkeypatch, ct.queries, "marginals", marginals)
    with pytest.raises(AssertionError) as caught:
        Anything().test_posterior_marginals_are_enumerated_ones()
    printed = "\n".join(caught.value.__notes__)
    assert "case=Case(circuit, seed=0, evidence=evidence)" in printed
    code = printed.split("This code rebuilds the case:\n\n")[1].split("\n\n")[0]
    assert len(code.splitlines()) <= 10  # two imports, five nodes, circuit, pc and evidence
    names = {}
    exec(code, names)
    pc, evidence = names["pc"], names["evidence"]
    assert len(pc.circuit.nodes) <= 5
    expected = ct.testing.enumerated_marginals(ct.testing.enumerate_joint(pc), evidence)
    assert not torch.allclose(ct.queries.marginals(pc, evidence), expected)


def test_a_wrong_structure_is_told_from_its_oracle():
    class FlatHMM(SmallHMM):
        def log_joint(self, pc):
            return (
                torch.full(pc.circuit.num_categories, 0.0)
                .double()
                .flatten()
                .log_softmax(0)
                .reshape(pc.circuit.num_categories)
            )

    with pytest.raises(AssertionError):
        falsify(FlatHMM, "test_the_likelihood_is_the_joint")


class ForgetfulMax(MaxSemiring):
    def product(self, factors):
        return factors[:, :-1].sum(1)


class SharpMax(MaxSemiring):
    def contract(self, log_weights, x, *, weights=None):
        return super().contract(2 * log_weights, x)


class MaxOfTimesMax(MaxSemiring):
    def times(self, left, right):
        return torch.maximum(left, right)


@pytest.mark.parametrize(
    ("semiring", "law"),
    [
        (ForgetfulMax, "test_products_are_repeated_times"),
        (SharpMax, "test_contractions_are_weighted_sums"),
        (SharpMax, "test_the_upward_pass_is_the_sum_over_configurations"),
        (MaxOfTimesMax, "test_zero_annihilates"),
    ],
)
def test_a_broken_semiring_is_caught(semiring, law):
    class Broken(ct.testing.SemiringTestCase):
        def semiring(self):
            return semiring()

        def plus(self, left, right):
            return torch.maximum(left, right)

        def times(self, left, right):
            return left + right

    with pytest.raises(AssertionError):
        falsify(Broken, law)


def test_a_family_is_told_from_another_oracle():
    class Swapped(ct.testing.FamilyTestCase):
        def distribution(self, draw):
            return ct.Bernoulli()

        def log_prob(self, distribution, parameters, values):
            return parameters.flip(0).log()

    with pytest.raises(AssertionError):
        falsify(Swapped, "test_the_table_is_that_of_the_oracle")


class SmallGaussian(ct.testing.DirectFamilyTestCase):
    def distribution(self, draw):
        return ct.Gaussian()

    def log_prob(self, distribution, parameters, values):
        return torch.distributions.Normal(*parameters).log_prob(values)


@pytest.mark.parametrize(
    ("method", "error", "law"),
    [
        ("log_density", 0.01, "test_the_density_is_that_of_the_oracle"),
        ("log_density", 0.01, "test_densities_integrate_to_one"),
        ("log_interval", -0.01, "test_intervals_are_sums_of_the_density"),
        ("draw", 0.4, "test_samples_follow_the_density"),
        ("fit", 0.5, "test_a_learning_step_on_complete_data_finds_the_best_fit"),
    ],
)
def test_a_mistake_in_a_family_is_caught_by_its_law(method, error, law, monkeypatch):
    falsify(SmallGaussian, law)  # which passes as long as nothing is broken
    replaced(monkeypatch, ct.Gaussian, method, lambda true, *args: true(*args) + error)
    with pytest.raises(AssertionError):
        falsify(SmallGaussian, law)


def test_an_unfinished_test_case_says_what_is_missing():
    class Unfinished(ct.testing.StructureTestCase):
        pass

    with pytest.raises(
        NotImplementedError, match=r"Unfinished.circuit\(self, draw\): expected a method that returns a ct.Circuit"
    ):
        Unfinished().test_probabilities_sum_to_one()


def test_a_law_can_be_added():
    class WithOwnLaw(SmallHMM):
        max_examples = 5
        seen: ClassVar[list] = []

        @ct.testing.law
        def test_the_root_has_one_unit(self, case):
            self.seen.append(case)
            assert case.circuit.root.num_units == 1

    WithOwnLaw().test_the_root_has_one_unit()
    assert len(WithOwnLaw.seen) >= 5


def test_circuits_are_traced_on_request():
    class Traced(SmallHMM):
        max_examples = 1
        checks_torch_compile = True

    Traced().test_torch_compile_gives_the_same_values_and_gradients()


def test_a_law_can_be_left_out():
    class WithoutMPE(SmallHMM):
        test_the_mpe_is_the_best_explanation = None

    class Further(WithoutMPE):
        pass

    assert Further.test_the_mpe_is_the_best_explanation is None


EVIDENCE = [
    ct.Evidence.observe(torch.tensor([[0, 2]])),
    ct.Evidence.observe(torch.tensor([[0, 2]]), torch.tensor([[True, False]])),
    ct.Evidence.nothing(3, 2),
    ct.Evidence.soft(torch.tensor([[[0.1, -torch.inf], [1 / 3, 2.0]]])),
    ct.Evidence.soft(torch.tensor([[[0.1, -torch.inf], [1 / 3, 2.0]]], dtype=torch.float64)),
    ct.Evidence.sparse(torch.tensor([[[1, 0]]]), torch.tensor([[[0.5, -0.5]]]), missing=torch.tensor([[True]])),
]


@pytest.mark.parametrize("evidence", EVIDENCE, ids=repr)
def test_the_repr_of_evidence_is_the_code_that_builds_it(evidence):
    rebuilt = eval(repr(evidence), {"ct": ct, "torch": torch})
    assert repr(rebuilt) == repr(evidence)
    assert torch.equal(rebuilt.dense(2, torch.float64), evidence.dense(2, torch.float64))
    assert torch.equal(rebuilt.factors.known(), evidence.factors.known())


def test_the_repr_of_much_evidence_is_short():
    assert repr(ct.Evidence.soft(torch.zeros(2, 3, 1000))) == "Evidence(dense, 2 queries, 3 variables, cpu)"


def test_importing_the_library_loads_no_test_framework():
    code = "import sys, circuits; print({'hypothesis', 'pytest', '_pytest'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
