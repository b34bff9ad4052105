-- include: common
-- include: job
-- include: crash
-- The id of the report that a job makes: that of its first run, whatever a later run would call it.
--
-- ARGV  1 job   2 fence   3 id
-- Returns {'ok', id} | {'lost'}
local job, fence = arg(1), arg(2)
if run_of(job, fence) ~= 'run' then
  return {'lost'}
end
local draft = key('crash', 'draft', job)
redis.call('HSETNX', draft, 'name', arg(3))
if redis.call('PTTL', draft) < 0 then
  redis.call('PEXPIRE', draft, int(math.max(JOB_TTL, 1000)))
end
return {'ok', redis.call('HGET', draft, 'name')}
