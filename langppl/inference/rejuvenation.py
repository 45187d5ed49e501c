"""Rejuvenation: Metropolis–Hastings moves of particles between sites, and at the end.

Resampling leaves copies; a move that leaves what the particles stand for as it is makes them
different again (Gilks and Berzuini 2001; Del Moral, Doucet, Jasra 2006, section 3). After n latents
that is γ_n: the probability of a particle's latents times all the evidence that it has met itself,
whatever of it counts yet in the crowd.

The evidence stays unbiased because nothing that the particles are decides whether and how they
move:

- All of them move after every latent, resampled or not. To move them only after a resampling would
  choose the kernel by the particles' own weights, and leave γ_n no longer as it is.
- γ_n is a function of the particle alone. Which factors count depends on the others.
- Among particles that stop before another latent, a move that would end the program is refused, and
  those whose program has ended stay. So a crowd whose programs have all ended is at its end, and
  would be if it went on.

At the end all move once more, now among whole executions. That leaves the weights as they are, so
the evidence too.

References:
    W. Gilks, C. Berzuini (2001). Following a moving target: Monte Carlo inference for dynamic
    Bayesian models. JRSS B.
    P. Del Moral, A. Doucet, A. Jasra (2006). Sequential Monte Carlo samplers. JRSS B.
"""

from __future__ import annotations

from langppl.inference.kernels import move
from langppl.inference.particles import Crowd, Particle
from langppl.program.execution import Choice, Execution


def rejuvenate(crowd: Crowd, decided: int | None, moves: int, tail_share: float) -> tuple[int, int]:
    """Moves the particles of a crowd in which no string grows.

    Args:
        crowd: the particles.
        decided: how many latents are decided in those that have not ended, which move; None at
            the end, where all do.
        moves: of each particle.
        tail_share: see `langppl.inference.kernels.move`.

    Returns:
        How many moves there were, and how many were accepted.
    """
    going = [
        (i, p)
        for i, p in enumerate(crowd.particles)
        if not p.is_dead and (p.is_over if decided is None else not p.is_over) and p.known
    ]
    accepted = 0
    for turn in range(moves):
        keys = [(crowd.seed, "smc", "move", decided or "end", turn, i) for i, _ in going]
        states = [p.execution for _, p in going]
        found = move(crowd.program, crowd.guide, states, keys, tail_share, decided)
        for (_, particle), moved in zip(going, found, strict=True):
            if moved.accepted:
                _put(particle, moved.execution)
                accepted += 1
    return moves * len(going), accepted


def _put(particle: Particle, execution: Execution) -> None:
    """Lets a particle stand elsewhere, with the weight under γ that it has."""
    own = particle.offset + particle.of_latents + sum(particle.view.factors.values())
    particle.execution = execution
    particle.known = {
        s.name: Choice(s.value, s.log_q, s.log_prob)
        for s in execution.sites.values()
        if s.kind == "latent"
    }
    particle.offset = own - particle.of_latents - sum(particle.view.factors.values())
