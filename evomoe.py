"""The curriculum: what changes when (to be filled)."""


def n_experts(step, cfg):
    return cfg.n_experts


def set_phase(model, step, cfg):
    for gate in model.gates():
        gate.set_step(step)
