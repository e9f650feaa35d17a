-- Takes one request out of a key's bucket, by Redis's clock. The bucket is one number: when it is full again, in
-- microseconds since the epoch. So it needs no refilling, and no key means full.
-- KEYS bucket   ARGV microseconds a request, burst
-- Answers {1 taken | 0 refused, requests left, microseconds until there is one more}
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local capacity = interval * burst
local DAY = 86400000

-- Never further off than an empty bucket's: Redis's clock may have been set back, or the key's burst made smaller.
local kept = tonumber(redis.call('GET', KEYS[1]) or 0)
local full = math.min(math.max(kept, now), now + capacity)
local taken = full + interval <= now + capacity
if taken then full = full + interval end
if taken or kept > full then
    -- A bucket that takes longer than a day to fill is full after an idle day: no key stays for ever.
    local idle = math.min(math.ceil((full - now) / 1000), DAY)
    redis.call('SET', KEYS[1], string.format('%.0f', full), 'PX', idle)
end
local left = math.floor((now + capacity - full) / interval)
return { taken and 1 or 0, left, full - now - (burst - left - 1) * interval }
