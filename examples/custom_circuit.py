"""A circuit of one's own in 20 lines, and exact answers from it.

Three binary variables: a disease, a test and a symptom that both depend on it. Run: python examples/custom_circuit.py
"""

import torch

import circuits as ct

# Nodes are vectors of units. Unit 0 of each leaf belongs to "healthy", unit 1 to "ill"; columns are distributions.
disease = ct.inputs(0, 2, ct.Bernoulli(), weights=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
test = ct.inputs(1, 2, ct.Bernoulli(), weights=torch.tensor([[0.95, 0.10], [0.05, 0.90]]))
symptom = ct.inputs(2, 2, ct.Bernoulli(), weights=torch.tensor([[0.80, 0.30], [0.20, 0.70]]))

# A product multiplies units of disjoint variables, a sum mixes units of the same variables.
joint = ct.sum(ct.product(disease, test, symptom), num_units=1, weights=torch.tensor([[0.99, 0.01]]))
circuit = ct.Circuit(joint)  # checked here: smooth, decomposable, one root
pc = ct.compile(circuit, dtype=torch.float64)
print(circuit, "->", pc)

# Evidence: the test is positive, nothing else is known.
x = torch.tensor([[0, 1, 0]])
observed = torch.tensor([[False, True, False]])
positive = ct.Evidence.observe(x, observed)
with torch.no_grad():
    print(f"P(test positive)          = {ct.queries.log_marginal(pc, x, observed).exp().item():.4f}")
    posterior = ct.queries.marginals(pc, positive)  # all variables at once, from one backward pass
    print(f"P(ill | test positive)    = {posterior[0, 0, 1].item():.4f}")
    assignment, log_score = ct.queries.mpe(pc, positive)
    print(f"most probable explanation = {assignment.tolist()[0]}, probability {log_score.exp().item():.4f}")

# Soft evidence: a second, unreliable report is three times as likely if the symptom is there.
log_factors = torch.zeros(1, 3, 2, dtype=torch.float64)
log_factors[0, 2, 1] = torch.tensor(3.0).log()
with torch.no_grad():
    both = ct.Evidence.mixed(x, observed, log_factors)
    print(f"P(ill | test and report)  = {ct.queries.marginals(pc, both)[0, 0, 1].item():.4f}")

# Samples, and learning the weights back from them.
data = ct.queries.sample(pc, 20_000, generator=torch.Generator().manual_seed(0))
learned = ct.compile(circuit, dtype=torch.float64)  # starts from the weights that the nodes were given
learned.randomize(seed=0)
result = ct.learning.fit(learned, data, optimizer="em", num_epochs=30, progress=False)
print(
    f"log-likelihood of the data: {pc(data).mean().item():.4f} true, {result.train_log_likelihood[-1]:.4f} learned, "
    "in nats per sample"
)
