"""From data to the paper: data -> training -> records -> notebooks -> figures and numbers -> paper, and theory beside it.

snakemake                                             the laptop tier
snakemake --configfile workflow/config/smoke.yaml     another tier: one file holds all of its settings
snakemake tuning                                      the learning-rate grids, on data held out of the training set (targets come first)
"""

import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.10")

ROOT = Path(workflow.basedir)
sys.path[:0] = [str(ROOT), str(ROOT / "workflow" / "scripts")]

if "tier" not in config:

    configfile: "workflow/config/laptop.yaml"


include: "workflow/rules/common.smk"


container: "docker-daemon://mango:latest"


wildcard_constraints:
    tier=TIER,
    experiment="|".join(TIER_CONFIG.experiments),
    variant="[^/]+",
    seed=r"\d+",


include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/contexts.smk"
include: "workflow/rules/theory.smk"
include: "workflow/rules/policy.smk"
include: "workflow/rules/notebooks.smk"
include: "workflow/rules/plan.smk"
include: "workflow/rules/paper.smk"
include: "workflow/rules/tuning.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        PDF,


localrules:
    all,
    policy,
