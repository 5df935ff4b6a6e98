# Sourced by interop-env and peer-env: a cached Python environment with PyTorch for the CPU.
#
# PyPI has PyTorch for Linux only as the CUDA build: 5.5 GB on disk and 90 s on two cores, downloads apart.
# With stubs in place of the CUDA libraries (stub_cuda.py) it is 1.4 GB and 41 s. The stubs are tried
# first; where PyTorch does not start with them, the whole is installed.
interop=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/tests/interop
me=${0##*/}
say() { echo "$me: $*" >&2; }

pip_install() {   # registries fail now and then: once more before giving up
  local args=(-m pip install -q --disable-pip-version-check --no-compile "$@")
  "$python" "${args[@]}" >&2 || { say "pip failed, trying once more"; sleep 10; "$python" "${args[@]}" >&2; }
}

new_venv() {
  rm -rf "$env"
  if ! python3 -m venv "$env" >&2; then
    say "python3 -m venv does not work; install it: sudo apt install python3-venv"
    exit 3
  fi
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
}

small() {          # its caller tests it, so that set -e is off in here: every step says && itself
  pip_install --no-deps "$(grep '^torch==' "$requirements")" &&
  # From now on pip takes PyTorch to need the CUDA runtime and CUPTI only.
  sed -i -E -e '/^Requires-Dist: (nvidia-|triton|cuda-bindings)/d' \
            -e 's/^(Requires-Dist: cuda-toolkit)\[[^]]*\]/\1[cudart,cupti]/' "$site"/torch-*.dist-info/METADATA &&
  before_install &&
  pip_install -r "$requirements" &&
  "$python" "$interop/stub_cuda.py" "$site" &&
  CUDA_VISIBLE_DEVICES='' "$python" -c "$works" >&2
}

whole() {
  before_install
  pip_install -r "$requirements"
  CUDA_VISIBLE_DEVICES='' "$python" -c "$works" >&2
}

# torch_env NAME REQUIREMENTS WORKS [FILE…]: makes the environment once and prints the path of its python.
# It lies under ${XDG_CACHE_HOME:-~/.cache}/gemcut/NAME-HASH, HASH over the requirements and FILEs that it is made
# from, and is used again while these stay the same. WORKS is Python that fails where the environment is no good.
# A function before_install of the caller's runs in the bare environment, whose packages lie in $site.
torch_env() {
  requirements=$2 works=$3
  env=${XDG_CACHE_HOME:-$HOME/.cache}/gemcut/$1-$(cat "$requirements" "$interop/stub_cuda.py" "${@:4}" | sha256sum | cut -c1-12)
  python=$env/bin/python
  if [ ! -e "$env/complete" ]; then
    say "making $env (some minutes)"
    mkdir -p "$env"
    exec 9>"$env.lock"
    flock 9                                # two test runs at once: the second waits and uses the first one's
  fi
  if [ ! -e "$env/complete" ]; then
    new_venv
    if ! small; then
      say "PyTorch does not start without its CUDA libraries; installing them"
      new_venv
      whole
    fi
    touch "$env/complete"
  fi
  echo "$python"
}
