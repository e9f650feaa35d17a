#!/bin/bash
# mongod takes a key file only if no other user can read it, so it gets a copy of the mounted one.
# The root user is made by the image's own entry point, when the data directory is empty.
set -euo pipefail

install --mode=400 --owner=999 --group=999 /run/secrets/mongodb_keyfile /tmp/keyfile # 999 is mongodb in the image
MONGO_INITDB_ROOT_USERNAME=root
MONGO_INITDB_ROOT_PASSWORD=$(cat /run/secrets/mongodb_root_password)
export MONGO_INITDB_ROOT_USERNAME MONGO_INITDB_ROOT_PASSWORD
exec docker-entrypoint.sh "$@"
