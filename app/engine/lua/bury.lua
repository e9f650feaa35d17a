-- A message has come to the dead letters: what becomes of its task.
-- ARGV id, epoch, retries, publish, 1 if it came back too often, how many starts that takes, error, reason
-- Answers 'missing' | 'FAILURE' (also if it was that before) | 'again' (it did not run often enough to be blamed: the
-- reconciler publishes it again) | 'stale' (nothing to do: it ended otherwise, or another message stands for it)
local record = redis.call('HMGET', task, 'status', 'epoch', 'retries', 'publish', 'starts')
local status = record[1]
if not status then return 'missing' end
if tonumber(ARGV[2]) < tonumber(record[2]) then return 'stale' end
if tonumber(ARGV[2]) > tonumber(record[2]) then
    catch_up(ARGV[2])
    status, record[3], record[5] = 'PENDING', ARGV[3], '0'
end
if FINAL[status] then return status == 'FAILURE' and status or 'stale' end
-- Of a later attempt the reconciler knows when its message is overdue.
if record[3] ~= ARGV[3] or RUNNING[status] and record[4] ~= ARGV[4] then return 'stale' end
if ARGV[5] == '1' and tonumber(record[5] or 0) < tonumber(ARGV[6]) then
    redis.call('HSET', task, 'lost', 1)
    look(ARGV[1], now())
    return 'again'
end
finalise(ARGV[1], 'FAILURE', 'error', ARGV[7], 'reason', ARGV[8])
return 'FAILURE'
