"""Known ways to break the decoding, each with the tests that must go red.

`test/mutation.py` applies them one at a time to a copy of the package.
"""

from mutations.by_confidence import BY_CONFIDENCE_MUTATIONS
from mutations.by_entropy import BY_ENTROPY_MUTATIONS
from mutations.by_memory import BY_MEMORY_MUTATIONS
from mutations.caches import CACHE_MUTATIONS
from mutations.mutation import Mutation
from mutations.samplers import SAMPLER_MUTATIONS
from mutations.shared import SHARED_MUTATIONS
from mutations.steps import STEP_MUTATIONS

MUTATIONS: tuple[Mutation, ...] = (
    *SHARED_MUTATIONS,
    *STEP_MUTATIONS,
    *CACHE_MUTATIONS,
    *SAMPLER_MUTATIONS,
    *BY_ENTROPY_MUTATIONS,
    *BY_CONFIDENCE_MUTATIONS,
    *BY_MEMORY_MUTATIONS,
)

__all__ = ["MUTATIONS", "Mutation"]
