#!/bin/bash
# Makes the secrets that deploy/compose.production.yml mounts: deploy/make-secrets.sh [DIRECTORY]
# Run once, before the first start: the servers remember their passwords with their data. Nothing is overwritten.
set -euo pipefail

directory=${1:-"$(dirname "$0")/secrets"}
if [ -n "$(ls -A "$directory" 2>/dev/null)" ]; then
    echo "$directory is not empty: what is there may be in use. Name another directory, or remove it first." >&2
    exit 1
fi

# Only the owner may enter the directory. The files in it can be read, since each container has a user of its own.
mkdir -p "$directory"
chmod 700 "$directory"
umask 022

mongodb=$(openssl rand -hex 32)
redis=$(openssl rand -hex 32)
rabbitmq=$(openssl rand -hex 32)

cd "$directory"
openssl rand -hex 32 >identity_secret
openssl rand -base64 756 >mongodb_keyfile
echo "$mongodb" >mongodb_root_password
echo "mongodb://root:$mongodb@mongodb:27017/?authSource=admin&directConnection=true" >mongodb_url
echo "requirepass $redis" >redis_conf
echo "redis://:$redis@redis:6379/0" >redis_url
printf 'default_user = stack\ndefault_pass = %s\n' "$rabbitmq" >rabbitmq_conf
echo "amqp://stack:$rabbitmq@rabbitmq:5672//" >rabbitmq_url

echo "Made $directory. Still missing there: your certificate with its chain as tls_certificate, and its key as tls_key,
both readable by all (the directory is not)."
