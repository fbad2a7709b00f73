#!/usr/bin/env bash
# csrc/cpu under AddressSanitizer and UndefinedBehaviorSanitizer, under ThreadSanitizer, without OpenMP, on processors
# that lack AVX-512 and AVX2, and on aarch64 (the last two where qemu-user is installed): driver.cpp on CASES random
# cases, then the tests of the kernels in Python with an extension built by the first two. Any report ends it.
#     PYTHON=python3 CASES=6000 tests/sanitizers/run.sh
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3} cases=${CASES:-1000}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
kernels=("$root"/csrc/cpu/*.cpp)
flags=(-std=c++17 -O2 -g -fopenmp -ffp-contract=fast -fno-math-errno -Wno-psabi -I"$root/csrc")
memory=(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)

echo "== AddressSanitizer and UndefinedBehaviorSanitizer"
g++ "${flags[@]}" "${memory[@]}" "${kernels[@]}" "$root/tests/sanitizers/driver.cpp" -o "$work/memory"
"$work/memory" "$cases"

echo "== ThreadSanitizer"
g++ "${flags[@]}" -fsanitize=thread -DZEST_CLONES= -c "$root/tests/sanitizers/driver.cpp" -o "$work/driver.o"
for kernel in "${kernels[@]}" "$root/tests/sanitizers/threads.cpp"; do
    g++ "${flags[@]}" -fsanitize=thread -DZEST_CLONES= -c "$kernel" -o "$work/$(basename "$kernel").o"
done
g++ -fsanitize=thread "$work"/*.o -o "$work/races" -pthread # no -fopenmp: threads.cpp is the runtime
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
    tests/kernels/test_kernels.py tests/kernels/test_kernels_fuzz.py tests/kernels/test_bits_kernel.py \
    tests/kernels/test_gated_kernel.py tests/kernels/test_storage.py -k "not subprocess and not openmp" "$@"
