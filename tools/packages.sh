# Sourced by quickstart and check: installs what Debian has to give, and only what is missing.
#   need_packages NAME…

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "gemcut: cannot install packages without root or sudo; as root, run: $*" >&2
        return 1
    fi
}

need_packages() {
    local missing=() p
    if ! command -v apt-get >/dev/null; then
        echo "gemcut: this script installs with apt-get (Debian, Ubuntu); elsewhere install what corresponds to: $*" >&2
        return 0
    fi
    for p in "$@"; do
        dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    echo "== installing: ${missing[*]}" >&2
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

build_packages=(gcc libc6-dev make cmake pkg-config libcjson-dev libxxhash-dev libzstd-dev libopenblas-pthread-dev)

# nvcc's path, or nothing; and whether there is an NVIDIA GPU to run on.
find_nvcc() { command -v nvcc || { [ -x /usr/local/cuda/bin/nvcc ] && echo /usr/local/cuda/bin/nvcc; } || true; }
has_gpu() { [ -e /dev/nvidiactl ]; }
