#!/bin/bash
# A job for each run that waits for such a worker, less those that Slurm has in its queue already. From cron, every few minutes:
#   */5 * * * * cd /path/to/tame && infra/slurm/feed.sh 80 --partition=h100      GPUs of 80 GB; the rest are sbatch's options
#   */5 * * * * cd /path/to/tame && infra/slurm/feed.sh cpu --gres=none
set -euo pipefail

kind=${1:?GB of a GPU, or cpu}
shift
set -a
. "${TAME_ENV:-$HOME/tame.env}"
set +a
. "${TAME_VENV:-.venv}/bin/activate"
filter=$(python - "$kind" <<'EOP'
import datetime, json, sys
from tasks.place import POOL, queues_of

queues = queues_of(None if sys.argv[1] == "cpu" else int(float(sys.argv[1]) * 1e9))
due = {"state": {"type": {"any_": ["SCHEDULED"]}}, "next_scheduled_start_time": {"before_": datetime.datetime.now(datetime.UTC).isoformat()}}
print(json.dumps({"work_pools": {"name": {"any_": [POOL]}}, "work_pool_queues": {"name": {"any_": queues}}, "flow_runs": due}))
EOP
)
waiting=$(prefect api POST /flow_runs/count --data "$filter")
queued=$(squeue --noheader --array --name="tame-$kind" --states=PENDING,CONFIGURING --user="$(id -un)" | wc -l)
for ((job = queued; job < waiting; job++)); do
    sbatch --job-name="tame-$kind" "$@" infra/slurm/worker.sbatch
done
