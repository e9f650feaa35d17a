-- A dead letter is replayed: its task, FAILURE in the epoch that the letter tells of, is PENDING again under a lease.
-- A record that has expired is made again.
-- ARGV id, epoch of the letter, lease ms, publish, queue max, backlog max, error, reason, field, value, ...
-- Answers {'created', epoch, created_at} | {'leased', ms left} (another replay is being published) | {'exists', status} (it was reopened by another hand, or has not failed)
--       | {'full', tasks a second that leave the queue} | {'backlog'}
local id, epoch, length, publish = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local time = now()
local old = redis.call('HMGET', task, 'status', 'epoch', 'unreplayed', 'lease_by', 'created_at', 'lease')

if old[1] then
    if old[4] == publish then return { 'created', old[2], old[5] } end -- our own call, repeated
    if old[1] == 'PENDING' and old[6] then return { 'leased', tonumber(old[6]) - time } end
    -- One that an earlier replay reopened and the broker did not take is as good as the one that failed.
    local untouched = old[1] == 'FAILURE' and (tonumber(old[2]) == epoch or old[3])
    if not untouched then return { 'exists', old[1] } end
end
if redis.call('XLEN', finished) >= tonumber(ARGV[6]) then return { 'backlog' } end
if redis.call('ZCOUNT', waiting, time, '+inf') >= tonumber(ARGV[5]) then return { 'full', drain_rate(time) } end

if old[1] then
    reopened()
else
    redis.call('HSET', task, 'status', 'PENDING', 'epoch', epoch + 1, 'retries', 0, 'attempts', 0, unpack(ARGV, 9))
end
-- What it is again should the broker not take it.
redis.call('HSET', task, 'was_error', ARGV[7], 'was_reason', ARGV[8])
lease(id, time, length, publish)
bump()
local run = redis.call('HMGET', task, 'epoch', 'created_at')
return { 'created', run[1], run[2] }
