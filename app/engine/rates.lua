#!lua flags=allow-oom
-- Reserves the next start of a task, over all workers, by Redis's clock. What is kept is when the one after it may be,
-- in microseconds since the epoch; no key means now.
-- KEYS rate   ARGV microseconds between two starts, microseconds that the caller would wait
-- Answers {1 reserved | 0 too far off, nothing reserved; microseconds until then}
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval, patience = tonumber(ARGV[1]), tonumber(ARGV[2])

-- Never further off than the last reservation can be: Redis's clock may have been set back.
local kept = math.min(tonumber(redis.call('GET', KEYS[1]) or 0), now + patience + interval)
local at = math.max(kept, now)
if at - now > patience then return { 0, at - now } end
redis.call('SET', KEYS[1], string.format('%.0f', at + interval), 'PX', math.ceil((at + interval - now) / 1000))
return { 1, at - now }
