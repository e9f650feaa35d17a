-- A circuit breaker by Redis's clock, shared by all who call one backend.
-- closed: calls pass; `failures` are the times of those within the window. open: none passes until `retry_at`.
-- half_open: one call passes, the probe; if it never answers, the next one may after `retry_at`.
-- Each change of state, and each probe, has a `generation`: a call tells how it went together with the generation it
-- began in, and counts in no other. A time is microseconds since the epoch, and so is a generation: no two are the same.
-- KEYS breaker   ARGV enter, probe's lease | failure, generation, most failures, window, open time | success, generation
-- enter answers {0 does not pass | 1 passes | 2 is the probe, generation, microseconds until it may}; the others 1 where they changed anything
local WEEK = 604800000
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local kept = redis.call('HMGET', KEYS[1], 'state', 'generation', 'retry_at', 'failures')
local state, generation, retry_at = kept[1] or 'closed', kept[2] or '0', tonumber(kept[3] or 0)

local function written(number)
    return string.format('%.0f', number)
end

local function become(following, ...)
    -- Later than any before it, also when Redis's clock was set back.
    generation = written(math.max(now, tonumber(generation) + 1))
    redis.call('HSET', KEYS[1], 'state', following, 'generation', generation, ...)
    redis.call('PEXPIRE', KEYS[1], WEEK)
end

if ARGV[1] == 'enter' then
    if state == 'closed' then return { 1, generation, 0 } end
    -- Never further off than it was set: the clock may have been set back.
    local wait = math.min(retry_at, now + tonumber(redis.call('HGET', KEYS[1], 'pause'))) - now
    if wait > 0 then return { 0, generation, wait } end
    become('half_open', 'retry_at', written(now + ARGV[2]), 'pause', ARGV[2])
    return { 2, generation, 0 }
end

if ARGV[2] ~= generation then return 0 end

if ARGV[1] == 'success' then
    if state ~= 'half_open' then return 0 end
    become('closed', 'failures', '[]', 'opened_at', '', 'retry_at', '0')
    return 1
end

local most, window, pause = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local recent = { written(now) }
for _, at in ipairs(cjson.decode(kept[4] or '[]')) do
    if #recent < most and tonumber(at) > now - window and tonumber(at) <= now then table.insert(recent, at) end
end
if state == 'half_open' or #recent >= most then
    become('open', 'failures', cjson.encode(recent), 'opened_at', written(now), 'retry_at', written(now + pause),
        'pause', pause)
else
    redis.call('HSET', KEYS[1], 'state', state, 'generation', generation, 'failures', cjson.encode(recent))
    redis.call('PEXPIRE', KEYS[1], WEEK)
end
return 1
