"""The figures that ACE-GLT's paper gives, to be held against.

Source: Wang et al., ECAI 2023 (arXiv 2308.02916). Of each method: the weight and the edge sparsity in percent of the
sparsest winning ticket on one axis alone (the loose form; "-" where there is none), and the highest test accuracy in
percent over the 20 rungs, ± where the paper gives it ("-" where it gives no accuracy). * marks what the paper calls
significant.
"""

from typing import NamedTuple

TABLE = """
dataset        backbone  method  weights  edges   accuracy
cora           gcn       random  -        -       82.05
cora           gcn       ugs     67.23    -       82.12±0.03
cora           gcn       gebt    59.36    -       81.98
cora           gcn       ace     89.64*   9.84    82.23±0.11
citeseer       gcn       random  49.61    -       71.00
citeseer       gcn       ugs     36.14    32.20   70.95±0.21
citeseer       gcn       gebt    48.79    14.26   71.18
citeseer       gcn       ace     83.91*   40.42*  71.53±0.18
pubmed         gcn       random  -        -       79.15
pubmed         gcn       ugs     95.63    11.75   79.58±0.04
pubmed         gcn       gebt    89.33    13.73   79.48
pubmed         gcn       ace     97.21*   22.66*  80.48±0.18*
cora           gin       random  -        13.74   78.88
cora           gin       ugs     90.96    24.36   79.48
cora           gin       gebt    92.94    18.57   78.95
cora           gin       ace     94.38*   37.14*  80.00±0.14*
citeseer       gin       random  60.08    25.31   68.93
citeseer       gin       ugs     96.49    26.48   69.83
citeseer       gin       gebt    95.00    30.15   69.72
citeseer       gin       ace     98.56*   36.97*  70.23±0.18*
pubmed         gin       random  74.19    -       78.83
pubmed         gin       ugs     92.32    15.27   79.20
pubmed         gin       gebt    86.00    12.26   79.39
pubmed         gin       ace     95.13*   30.20*  79.48±0.11
cora           gat       random  73.37    9.36    78.15
cora           gat       ugs     91.71    37.14   79.05
cora           gat       gebt    84.17    40.40   78.90
cora           gat       ace     93.37*   46.31*  79.18±0.11
citeseer       gat       random  80.01    -       67.25
citeseer       gat       ugs     92.44    40.11   68.33
citeseer       gat       gebt    86.62    14.26   68.27
citeseer       gat       ace     93.15    49.72*  68.49±0.13
pubmed         gat       random  -        -       77.28
pubmed         gat       ugs     95.63    54.01   78.05
pubmed         gat       gebt    94.54    46.31   78.13
pubmed         gat       ace     97.76*   58.58*  78.38±0.11
ogbn-arxiv     resgcn    ugs     89.63    43.44   -
ogbn-arxiv     resgcn    ace     93.43    46.31   -
ogbn-proteins  resgcn    ugs     74.16    26.53   -
ogbn-proteins  resgcn    ace     86.99    37.14   -
"""


class Figures(NamedTuple):
    """As the paper prints them."""

    weights: str
    edges: str
    accuracy: str


PUBLISHED: dict[tuple[str, str, str], Figures] = {
    (dataset, backbone, method): Figures(*figures)
    for dataset, backbone, method, *figures in map(str.split, TABLE.split("\n")[2:-1])
}
