#!/usr/bin/env bash
# csrc/cpu under AddressSanitizer and UndefinedBehaviorSanitizer, under ThreadSanitizer, without OpenMP, on processors
# that lack AVX-512 and AVX2, and on aarch64 (the last two where qemu-user is installed): driver.cpp on CASES random
# cases, then the tests of the kernels in Python with an extension built by the first two. Any report ends it.
#     PYTHON=python3 CASES=6000 tests/sanitizers/run.sh
#     tests/sanitizers/run.sh --self-test       # plants a bug of each kind into a copy, and expects each to be reported
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3} cases=${CASES:-1000}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
kernels=("$root"/csrc/cpu/*.cpp)
flags=(-std=c++17 -O2 -g -fopenmp -ffp-contract=fast -fno-math-errno -Wno-psabi -I"$root/csrc")
memory=(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)

build_memory() { # program, kernels
    g++ "${flags[@]}" "${memory[@]}" "${@:2}" "$root/tests/sanitizers/driver.cpp" -o "$1"
}

build_races() { # program, kernels
    local objects=() source
    for source in "${@:2}" "$root/tests/sanitizers/driver.cpp" "$root/tests/sanitizers/threads.cpp"; do
        objects+=("$1-$(basename "$source").o")
        g++ "${flags[@]}" -fsanitize=thread -DZEST_ONE_VERSION -c "$source" -o "${objects[-1]}"
    done
    g++ -fsanitize=thread "${objects[@]}" -o "$1" -pthread # no -fopenmp: threads.cpp is the runtime
}

planted() { # what it is, edit of bits.cpp, how it is built, the report that has to come
    local copy="$work/bits.cpp" others=()
    sed "$2" "$root/csrc/cpu/bits.cpp" > "$copy"
    if cmp -s "$copy" "$root/csrc/cpu/bits.cpp"; then
        echo "$1: the edit changes nothing, bits.cpp is another one now" && return 1
    fi
    for kernel in "${kernels[@]}"; do [[ $kernel == */bits.cpp ]] || others+=("$kernel"); done
    "$3" "$work/planted" "$copy" "${others[@]}"
    if "$work/planted" 200 > "$work/said" 2>&1 || ! grep -q "$4" "$work/said"; then
        echo "$1: not reported" && tail -n 20 "$work/said" && return 1
    fi
    echo "$1: reported ($(grep -m 1 -o "$4" "$work/said"))"
}

if [[ ${1:-} == --self-test ]]; then
    planted "a read beyond the end" 's/for (int64_t i = whole; i < n; ++i)/for (int64_t i = whole; i <= n; ++i)/' \
        build_memory "AddressSanitizer: heap-buffer-overflow"
    planted "a signed overflow" 's/^    uint8_t mask\[block\];$/& volatile int planted = 2147483647; planted = planted + int(n % 2) + 1;/' \
        build_memory "runtime error: signed integer overflow"
    planted "a race" 's/ work(first, .* run);/ { static int64_t planted = 0; ++planted; & }/' \
        build_races "ThreadSanitizer: data race"
    exit
fi

echo "== AddressSanitizer and UndefinedBehaviorSanitizer"
build_memory "$work/memory" "${kernels[@]}"
"$work/memory" "$cases"

echo "== ThreadSanitizer"
build_races "$work/races" "${kernels[@]}"
"$work/races" "$cases"

echo "== Processors that lack what this one has"
if command -v qemu-x86_64 >/dev/null; then
    g++ "${flags[@]}" "${kernels[@]}" "$root/tests/sanitizers/driver.cpp" -o "$work/plain"
    for processor in Nehalem Haswell; do # x86-64-v2; AVX2 without AVX-512
        qemu-x86_64 -cpu "$processor" "$work/plain" "$((cases / 10))"
    done
else
    echo "not run: qemu-x86_64 is not installed (apt-get install qemu-user)"
fi

echo "== aarch64"
if command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-g++ >/dev/null; then
    aarch64-linux-gnu-g++ "${flags[@]}" "${kernels[@]}" "$root/tests/sanitizers/driver.cpp" -o "$work/aarch64"
    qemu-aarch64 -L /usr/aarch64-linux-gnu "$work/aarch64" "$((cases / 10))"
else
    echo "not run: qemu-aarch64 or its compiler is not installed (apt-get install qemu-user g++-aarch64-linux-gnu)"
fi

echo "== Without OpenMP"
g++ "${flags[@]}" -fno-openmp "${kernels[@]}" "$root/tests/sanitizers/driver.cpp" -o "$work/one_thread"
"$work/one_thread" "$cases"

echo "== The tests of the kernels with the sanitized extension"
mkdir "$work/tree" "$work/build"
cp -r "$root/zest_fast" "$work/tree/zest_fast"
rm -f "$work"/tree/zest_fast/_native*.so
includes=$("$python" -c 'import sysconfig; print("-I" + sysconfig.get_path("include"))')
pybind=$("$python" -c 'import pybind11; print("-I" + pybind11.get_include())')
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
g++ "${flags[@]}" "${memory[@]}" "$includes" "$pybind" -fPIC -shared "${kernels[@]}" "$root/csrc/bindings.cpp" \
    -o "$work/tree/zest_fast/_native$suffix"
cd "$root"
# Python itself keeps what it never frees; torch's own memory is of no interest here.
LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$work/tree" "$python" -m pytest -n 0 -q -p no:cacheprovider \
    -o "pythonpath=$work/tree tests/support tests/support/zoo" -W ignore \
    tests/kernels/test_kernels.py tests/kernels/test_kernels_fuzz.py tests/kernels/test_kernels_metamorphic.py \
    tests/kernels/test_bits_kernel.py tests/kernels/test_gated_kernel.py tests/kernels/test_storage.py -k "not subprocess and not openmp" "$@"
