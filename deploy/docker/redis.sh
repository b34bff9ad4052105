#!/bin/sh
# Starts the fleet's Redis inside the stock redis image. The password is written to a file on a tmpfs, because a command
# line is visible to every process of the host; REDIS_PASSWORD must hold no double quote, backslash or blank.
set -eu
umask 077
conf="${REDIS_CONF:-/run/mothball/redis.conf}"
cat >"$conf" <<END
requirepass "${REDIS_PASSWORD:?}"
dir "${REDIS_DATA:-/data}"
port ${REDIS_PORT:-6379}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
hash-max-ziplist-value 1024
tcp-keepalive 60
END
unset REDIS_PASSWORD
# The image's own entry point drops root and becomes the server.
if [ "$(id -u)" = 0 ] && id redis >/dev/null 2>&1; then chown redis "$conf"; fi
exec docker-entrypoint.sh redis-server "$conf"
