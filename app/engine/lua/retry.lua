-- A run failed and will be tried again, or is put off: written before the next message is published.
-- ARGV id, epoch, retries, publish, run, ms until due, error ('' where nothing failed), ms from then to the next look,
--      error of a cancel, retries of the next message
-- Answers 'RETRY' | 'CANCELLED' (was asked for meanwhile) | 'lost' | 'missing'
local record = redis.call('HMGET', task, 'status', 'cancel', 'epoch', 'retries', 'attempts')
if not record[1] then return 'missing' end
-- Our own call, repeated because its answer was lost.
if record[1] == 'RETRY' and record[3] == ARGV[2] and record[4] == ARGV[10] and record[5] == ARGV[5] then
    return 'RETRY'
end
if not RUNNING[record[1]] or not holds(ARGV[2], ARGV[3], ARGV[4], ARGV[5]) then return 'lost' end
if record[2] then
    finalise(ARGV[1], 'CANCELLED', 'error', ARGV[9])
    return 'CANCELLED'
end
local due = now() + ARGV[6]
redis.call('HSET', task, 'status', 'RETRY', 'retries', ARGV[10], 'starts', 0, 'due_at', due)
if ARGV[7] ~= '' then redis.call('HSET', task, 'error', ARGV[7]) end
wait(ARGV[1], '+inf')
look(ARGV[1], due + ARGV[8])
bump()
return 'RETRY'
