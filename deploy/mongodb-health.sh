#!/bin/bash
# Healthy is: the writable member of the replica set. The first run of all makes the set, of this one member.
# mongosh costs about a second of CPU, so it asks until the first success and then once a minute;
# in between it is enough that the port answers.
set -eu

known=/tmp/known-writable
if [ -n "$(find "$known" -mmin -1 2>/dev/null)" ]; then
    exec 3<>/dev/tcp/127.0.0.1/27017
    exit
fi

# HOME is where mongosh keeps its logs, and in this image that is the data directory.
HOME=/tmp mongosh --quiet --norc --eval '
    const secret = "/run/secrets/mongodb_root_password";
    if (fs.existsSync(secret)) db.getSiblingDB("admin").auth("root", fs.readFileSync(secret, "utf8").trim());
    try {
        rs.status();
    } catch (error) {
        if (error.codeName !== "NotYetInitialized") throw error;
        rs.initiate({ _id: "rs0", members: [{ _id: 0, host: "mongodb:27017" }] });
    }
    quit(db.hello().isWritablePrimary ? 0 : 1);
'
touch "$known"
