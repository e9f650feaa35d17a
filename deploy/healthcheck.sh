#!/bin/bash
# Is this container's process well? Bash alone, since it runs every few seconds in each container.
# Workers and beat touch ALIVE_FILE every 5 s while their loop runs and the broker is there; the others answer on HTTP:
#   healthcheck [PORT [PATH]]   8000 /health/live
set -eu

if [ -n "${ALIVE_FILE:-}" ]; then
    age=$(( $(date +%s) - $(stat -c %Y "$ALIVE_FILE") ))
    echo "alive $age s ago"
    [ "$age" -lt 30 ]
else
    exec 3<>"/dev/tcp/127.0.0.1/${1:-8000}"
    printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "${2:-/health/live}" >&3
    read -r -t 3 answer <&3
    echo "$answer"
    [[ $answer == *" 200 "* ]]
fi
