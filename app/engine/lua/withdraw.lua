-- The broker did not confirm. A record that only this publish has touched and that the broker refused for certain
-- vanishes; any other becomes FAILURE, or is again the failure that was to be replayed. A task that a worker has started meanwhile stays as it is.
-- ARGV id, publish, 1 if refused for certain, error
-- Answers nil if that was done, else the status that the record has by another hand.
local record = redis.call('HMGET', task, 'status', 'lease_by', 'publishes', 'unpublished', 'unreplayed')
if record[4] or record[5] then return false end
if record[1] ~= 'PENDING' or record[2] ~= ARGV[2] then return record[1] end
if ARGV[3] == '1' and record[3] == '1' then
    redis.call('DEL', task)
    redis.call('ZREM', waiting, ARGV[1])
    redis.call('ZREM', open, ARGV[1])
    return false
end
local was = redis.call('HMGET', task, 'was_error', 'was_reason')
if was[1] then
    finalise(ARGV[1], 'FAILURE', 'error', was[1], 'reason', was[2], 'unreplayed', 1)
else
    finalise(ARGV[1], 'FAILURE', 'error', ARGV[4], 'unpublished', 1)
end
return false
