#!/usr/bin/env bash
# Build the image and run it (make test-docker): some 10 minutes, 15 GB under $TMPDIR. With a Docker engine, docker does
# it; without one, and without a registry of images, buildah on a base made by debootstrap from Debian's packages, as
# root on Debian or Ubuntu. Arguments shorten the demo: build_and_run.sh --trainer.max_steps 20
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

scratch=$(mktemp -d "${TMPDIR:-/tmp}/fm-stages-container-XXXXXX")
image=fm-stages-test-$$
demo=fm-stages-demo-$$
passed=0 failed=0

docker info >/dev/null 2>&1 && engine=docker || engine=buildah
export STORAGE_DRIVER=${STORAGE_DRIVER:-overlay} BUILDAH_ISOLATION=chroot # vfs copies all of torch with every layer
buildah="buildah --root $scratch/storage --runroot $scratch/runroot"

cleanup() {
    if [ "$engine" = docker ]; then
        docker rm -f "$demo" || true
        docker rmi -f "$image" "$image:before"
    else
        awk -v at="$scratch/" 'index($2, at) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r -n 1 umount
    fi >/dev/null 2>&1 || true
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

finish() {
    echo "$passed passed, $failed failed"
    exit $((failed > 0))
}

check() { # what is claimed, and the command that shows it
    local claim=$1
    shift
    if "$@"; then
        passed=$((passed + 1)) && echo "passed: $claim"
    else
        failed=$((failed + 1)) && echo "FAILED: $claim"
    fi
}

# A base image out of nothing but Debian's packages.
make_base() {
    command -v buildah debootstrap >/dev/null || apt-get install -y --no-install-recommends buildah debootstrap
    . /etc/os-release
    mkdir "$scratch/base"
    debootstrap --variant=minbase "$VERSION_CODENAME" "$scratch/base/tree" >"$scratch/debootstrap.log" || {
        tail "$scratch/debootstrap.log"
        return 1
    }
    printf 'FROM scratch\nCOPY tree /\n' >"$scratch/base/Dockerfile"
    $buildah build -q -t localhost/base "$scratch/base" && rm -r "$scratch/base"
}

# How this machine's pip reaches its packages, for the build alone. The marker would betray it in a layer.
marker=not-for-the-image-$$-$RANDOM$RANDOM
make_secrets() {
    {
        echo "# $marker"
        echo "[global]"
        python3 -m pip config list | sed -nE "s/^[^.]*\.(index-url|trusted-host|proxy|timeout)='(.*)'$/\1 = \2/p"
        echo "cert = /run/secrets/ca.pem"
    } >"$scratch/pip.conf"
    { echo "# $marker" && cat "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}"; } >"$scratch/ca.pem"
}

build() {
    local flags="--secret id=pip.conf,src=$scratch/pip.conf --secret id=ca.pem,src=$scratch/ca.pem" start=$SECONDS
    if [ "$engine" = docker ]; then
        make -C "$scratch/source" docker IMAGE="$image" BUILD_FLAGS="$flags" || return
    else
        make -C "$scratch/source" docker BUILDER="$buildah" BASE=localhost/base IMAGE="$image" BUILD_FLAGS="$flags" \
            || return
    fi
    echo "Built in $((SECONDS - start)) s."
}

inspect() { # a template, which Docker and buildah write differently
    if [ "$engine" = docker ]; then
        docker image inspect --format "$1" "$image"
    else
        $buildah inspect --type image --format "${2:-$1}" "$image"
    fi
}

layers() { inspect '{{range .RootFS.Layers}}{{println .}}{{end}}' '{{range .OCIv1.RootFS.DiffIDs}}{{println .}}{{end}}'; }

# All layers but the two of the source (its files; its installation) are the very ones of the build before.
rebuild_keeps_libraries() {
    local before after kept
    before=$(layers)
    [ "$engine" != docker ] || docker tag "$image" "$image:before" # or it would lie about without a name
    echo "# Another version." >>"$scratch/source/fm_stages/cli.py"
    build || return
    after=$(layers)
    kept=$(comm -12 <(sort <<<"$before") <(sort <<<"$after") | wc -l)
    echo "$kept of $(wc -l <<<"$after") layers kept."
    [ "$before" != "$after" ] && [ "$kept" -ge "$(($(wc -l <<<"$after") - 2))" ]
}

inside() { # [options of run ...] -- command ...
    local options=()
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    if [ "$engine" = docker ]; then
        docker run --rm ${options[@]+"${options[@]}"} "$image" "$@"
    else
        $buildah run ${options[@]+"${options[@]}"} "$demo" -- "$@"
    fi
}

# The image's own command, or the demo made shorter. buildah knows a command, but does not run it by itself.
run_demo() {
    local command=()
    [ $# -eq 0 ] || command=(fm-stages fit --config configs/digits_dit.yaml "$@")
    if [ "$engine" = docker ]; then
        docker run --init --name "$demo" "$image" ${command[@]+"${command[@]}"}
    else
        $buildah from -q --name "$demo" "$image" || return
        [ $# -gt 0 ] || mapfile -t command < <(inspect '' '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}' | sed '/^$/d')
        inside -- "${command[@]}"
    fi
}

left_by_demo() {
    if [ "$engine" = docker ]; then docker cp "$demo:/fm-stages/runs" -; else inside -- tar -c runs; fi |
        tar -tv --numeric-owner
}

results_of_plain_user() {
    local files=$scratch/left
    left_by_demo >"$files" || return
    grep -q 'checkpoints/last.ckpt$' "$files" && grep -q 'oracle/.*\.png$' "$files" || return
    ! grep digits_dit "$files" | grep -v ' 1000/1000 '
}

plain_user() { inside -- id && [ "$(inside -- id -u)" -eq 1000 ]; }

commands_start() { inside -- fm-stages --help && inside -- torchrun --help >/dev/null; }

# A folder of somebody else: refused with its name, and open to that somebody with --user.
two_steps=(fm-stages fit --config configs/digits_dit.yaml --trainer.max_steps 2 --trainer.logger CSVLogger)
owner=$(id -u)
[ "$owner" -ne 0 ] || owner=4242

stranger_is_told() {
    mkdir -m 755 "$scratch/runs" && chown "$owner" "$scratch/runs" || return
    ! inside --user 4343:4343 -v "$scratch/runs:/fm-stages/runs" -- "${two_steps[@]}" >"$scratch/refused" 2>&1 &&
        grep "Permission denied: '.*runs/digits_dit'" "$scratch/refused"
}

owner_may_write() {
    inside --user "$owner:$owner" -v "$scratch/runs:/fm-stages/runs" -- "${two_steps[@]}" &&
        [ "$(stat -c %u "$scratch/runs/digits_dit/checkpoints/last.ckpt")" -eq "$owner" ]
}

# Docker's tree is searched as a container sees it (it may keep the layers compressed), buildah's layer by layer; and
# in both what the image says of itself.
nothing_of_this_machine() {
    { echo "$marker" && sed -nE 's/^(index-url|proxy) = //p' "$scratch/pip.conf"; } >"$scratch/patterns"
    if [ "$engine" = docker ]; then
        { docker history --no-trunc "$image" && docker export "$demo"; } | { ! grep -aqF -f "$scratch/patterns"; }
    else
        grep -rlF -f "$scratch/patterns" "$scratch/storage"
        [ $? -eq 1 ] # 2: something could not be read
    fi
}

mkdir "$scratch/source"
git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$scratch/source"
make_secrets
[ "$engine" = docker ] || check "a base image is made without a registry" make_base
check "make docker builds the image" build
[ "$failed" -eq 0 ] || finish
check "another version of the source is built without installing torch again" rebuild_keeps_libraries
check "the demo runs" run_demo "$@"
check "it left its results, all of a plain user" results_of_plain_user
check "nobody is root inside" plain_user
check "fm-stages and torchrun start" commands_start
check "a mounted folder of another user is refused by name" stranger_is_told
check "--user makes a mounted folder one's own" owner_may_write
check "no layer holds the secrets of the build" nothing_of_this_machine
[ "$engine" = docker ] && size=$(inspect '{{.Size}}') || size=$($buildah images --format '{{.Size}}' "$image")
echo "Size of the image: $size"
finish
