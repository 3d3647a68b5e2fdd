#!/bin/sh
# timed.sh PART COMMAND...: runs a command, and notes in target/times how long it took.
# timed.sh PART: says what was noted of a part, and what setting it up took.
part=$1
shift
mkdir -p target
if [ $# = 0 ]; then
	for part in set-up "$part"; do
		sed -n "s/^$part: //p" target/times |
			awk -v part="$part" '{ print; sum += $1 } END { if (NR) printf "%6d s  %s\n", sum, part }'
		sed -i "/^$part: /d" target/times
	done
	exit
fi
begun=$(date +%s)
"$@"
status=$?
took=$(($(date +%s) - begun))
shown=$(echo "$*" | sed "s|$PWD/||g" | cut -c1-100)
printf '%s: %6d s  %s\n' "$part" "$took" "$shown" >>target/times
exit $status
