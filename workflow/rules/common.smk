"""The tier's settings, checked before any job starts, and the paths that every rule shares."""

import jobs
from mango.errors import MangoError
from snakemake.common.configfile import load_configfile

jobs.prepare_environment()

try:
    SETTINGS_FILE = jobs.settings_file(workflow.overwrite_configfiles or workflow.configfiles)
    TIER_CONFIG = jobs.settings(SETTINGS_FILE, config, load_configfile(SETTINGS_FILE))
    DATA = {name: jobs.data_settings(TIER_CONFIG, name) for name in TIER_CONFIG.experiments}
except MangoError as error:
    print(f"snakemake: error: {error}", file=sys.stderr)
    sys.exit(2)

TIER = TIER_CONFIG.tier
RESULTS = f"results/{TIER}"
LOGS = f"logs/{TIER}"
