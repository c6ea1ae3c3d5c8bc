"""Which of two images ranks higher: relational attention over the patches of both, without forming any pair of images.

    L_ij = Q [K_i; K_j]ᵀ / √d,   A = softmax over the 2P patches of both,   O_ij = A_i K_i − A_j K_j     (M × D)
    s_ij = MLP(Σ_m W_o O_ijm + b)

Q: M relational tokens, learned; K: keys that are the values too (as released). The joint softmax factorises: with
l_i = logsumexp over the patches of i and u_i = softmax(Q K_iᵀ / √d) K_i, both of one image,

    g_ij = σ(l_i − l_j),   O_ij = g_ij u_i − (1 − g_ij) u_j

and, as W_o is linear, the sum over the M tokens may come before it; with 1 − g_ij = g_ji it is one batched product and
the same with the images changed over:

    Σ_m O_ijm = F_ij − F_ji,   F_ij = Σ_m g_ijm u_im

Of N images nothing of N² M D or N² P is made: N² h M for g, N² D for F. The naive form needs N² h M 2P. Paper: arXiv
2412.06760; the factorisation is ours.
"""

import torch
from torch import Tensor, nn


class PairHead(nn.Module):
    """Scores of ordered pairs, N × N, from patch states N × P × D; above 0: the first image ranks higher.

    antisymmetric: s_ij = f(O_ij) − f(O_ji), where O_ji = −O_ij: then s_ij = −s_ji and s_ii = 0, to the bit. Without it
    (as released) the bias of W_o and the MLP tell i from j.
    """

    def __init__(self, width: int, heads: int, tokens: int, antisymmetric: bool = True):
        super().__init__()
        self.heads, self.antisymmetric = heads, antisymmetric
        self.tokens = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.to_query, self.to_key = nn.Linear(width, width), nn.Linear(width, width)
        self.query_norm, self.key_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        self.score = scorer(width, depth=3, norm_first=True)

    def forward(self, states: Tensor) -> Tensor:
        """Return s, N × N."""
        query, keys = self.projected(states)
        scores = self.score(self.summed(*gates_and_values(query, keys))).squeeze(-1)
        return scores - scores.t() if self.antisymmetric else scores

    def projected(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries, h × M × d, scaled, and the keys of every image, N × h × P × d."""
        query = self._split(self.query_norm(self.to_query(self.tokens)))  # h, M, d
        keys = self._split(self.key_norm(self.to_key(states)))  # N, h, P, d
        return query * query.shape[-1] ** -0.5, keys

    def summed(self, gates: Tensor, values: Tensor) -> Tensor:
        """Return Σ_m (W_o O_ijm + b), N × N × D. gates: N × h × N × M, g_ij; values: N × h × M × d, u."""
        first = gates @ values  # [i, h, j, d]: Σ_m g_ijm u_im
        # g_ij − 1 = −g_ji, so that Σ_m (g_ijm − 1) u_jm is what j's own gates weigh, turned
        pairs = first.transpose(1, 2) - first.permute(2, 0, 1, 3)  # [i, j, h, d]
        flat = pairs.reshape(*pairs.shape[:2], -1)
        return nn.functional.linear(flat, self.out.weight, self.out.bias * values.shape[2])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)


def gates_and_values(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return g, N × h × N × M, and u, N × h × M × d: all that the pairs see of N images.

    query: h × M × d, scaled; keys: N × h × P × d. g[i, :, j] is how much of the joint attention falls on i.
    """
    logits = query @ keys.transpose(-1, -2)  # N, h, M, P
    mass = logits.logsumexp(-1)  # N, h, M
    values = logits.softmax(-1) @ keys
    gates = torch.sigmoid(mass.unsqueeze(2) - mass.permute(1, 0, 2).unsqueeze(0))
    return gates, values


def scorer(width: int, depth: int, norm_first: bool = False) -> nn.Sequential:
    """Return an MLP to one number: `depth` times linear, norm, ReLU, then linear; a norm before all, if asked for."""
    layers: list[nn.Module] = [nn.LayerNorm(width)] if norm_first else []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1))
