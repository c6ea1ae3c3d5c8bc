"""addenda: small changes to large models. Public names, nothing else."""

from addenda.core.adapter import Adapter, adapters
from addenda.core.attach import attach, detach, disabled, status, switch
from addenda.core.errors import AddendaError
from addenda.methods import *  # noqa: F403
