#!/bin/sh
# Install the Debian packages that a list names (one a line, # comments) and this machine lacks.
set -eu
list=$1
missing=
for package in $(sed 's/#.*//' "$list"); do
	dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' ||
		missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null; then
	echo "this needs the packages:$missing" >&2
	exit 1
fi
as_root=
[ "$(id -u)" = 0 ] || as_root=sudo
echo "installing:$missing"
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update -q >/dev/null
# The services of these packages are not wanted: tests start their own.
$as_root apt-get install -q -y --no-install-recommends $missing >/dev/null
