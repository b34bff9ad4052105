-- include: common
-- include: job
-- include: crash
-- Is there a report of the same failure within the window? Then this one is counted on it.
--
-- ARGV  1 job   2 fence   3 workspace   4 signature   5 scope   6 ms at which it happened   7 ms of the window   8 occurrence, JSON
--       9 most occurrences
-- Returns {'again', HGETALL of the report's record} | {'none'} | {'lost'}. Once per job, however often it is asked.
local job, fence, ws, at = arg(1), arg(2), arg(3), arg(6)
if run_of(job, fence) ~= 'run' then
  return {'lost'}
end
local same = crash_same(key('crash', 'sig', arg(4), arg(5)), tonumber(arg(7)))
if not same then
  return {'none'}
end
crash_again(same, job, ws, at, arg(8), tonumber(arg(9)))
return {'again', redis.call('HGETALL', crash_key(same))}
